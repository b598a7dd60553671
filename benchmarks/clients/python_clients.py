"""A chat, a stream and a structured answer through each Python client; prints one line of JSON for each step.

Runs in the environment that run.py makes. A step is ok when what the client itself returns is what it promises:
text, several pieces that end, arguments that are valid for the schema (tools are `strict`, as in OpenAI's API: only
then the schema binds). What a model of 135 million parameters says is not judged.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import litellm
import llm
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from openai import OpenAI
from pydantic import BaseModel, SecretStr

URL, KEY, MODEL = os.environ["CLIENT_URL"], os.environ["CLIENT_KEY"], os.environ["CLIENT_MODEL"]
ASK = "What is the capital of France?"
MESSAGES = [{"role": "user", "content": ASK}]


class Place(BaseModel):
    """An answer whose every value is one of a few."""

    city: Literal["Paris", "London", "Rome"]
    capital: bool


FUNCTION = {
    "name": "look_up", "description": "Look a place up.", "strict": True, "parameters": Place.model_json_schema()
}  # fmt: skip
TOOL = {"type": "function", "function": FUNCTION}
FORCED = {"type": "function", "function": {"name": "look_up"}}


def step(client: str, name: str, act: Callable[[], str]) -> None:
    try:
        detail, ok = act(), True
    except Exception as error:
        detail, ok = f"{type(error).__name__}: {error}"[:400], False
    print(json.dumps({"client": client, "step": name, "ok": ok, "detail": detail}), flush=True)


def text_of(text: str | None) -> str:
    found = (text or "").strip()
    assert found, "no text"
    return f"{len(found)} characters"


def pieces_of(pieces: Iterator[str | None]) -> str:
    found = [piece for piece in pieces if piece]
    assert len(found) > 1, f"{len(found)} pieces"
    return f"{len(found)} pieces"


def place_of(arguments: str) -> str:
    return Place.model_validate_json(arguments).model_dump_json()


def with_openai() -> None:
    client, name = OpenAI(base_url=URL, api_key=KEY, max_retries=0), "openai (Python)"
    create = client.chat.completions.create
    base = {"model": MODEL, "messages": MESSAGES, "max_tokens": 32, "temperature": 0}
    step(name, "chat", lambda: text_of(create(**base).choices[0].message.content))
    step(name, "stream", lambda: pieces_of(
        chunk.choices[0].delta.content for chunk in create(**base, stream=True) if chunk.choices
    ))  # fmt: skip

    def tool_call() -> str:
        answer = create(**base | {"max_tokens": 128}, tools=[TOOL], tool_choice=FORCED)
        return place_of(answer.choices[0].message.tool_calls[0].function.arguments)

    def ending() -> str:
        answer = create(**base | {"max_tokens": 128}, tools=[TOOL], tool_choice=FORCED)
        return str(answer.choices[0].finish_reason)

    def streamed_tool_call() -> str:
        chunks = create(**base | {"max_tokens": 128}, tools=[TOOL], tool_choice=FORCED, stream=True)
        calls = [
            call for chunk in chunks for choice in chunk.choices for call in choice.delta.tool_calls or ()
        ]
        assert [call.function.name for call in calls if call.function.name] == ["look_up"]
        return place_of("".join(call.function.arguments or "" for call in calls))

    def json_schema() -> str:
        answer = client.chat.completions.parse(**base | {"max_tokens": 128}, response_format=Place)
        return answer.choices[0].message.parsed.model_dump_json()

    def responses() -> str:
        return text_of(client.responses.create(model=MODEL, input=ASK, max_output_tokens=32).output_text)

    def streamed_response() -> str:
        events = client.responses.create(model=MODEL, input=ASK, max_output_tokens=32, stream=True)
        return pieces_of(event.delta for event in events if event.type == "response.output_text.delta")

    step(name, "forced call", ending)
    step(name, "tool call", tool_call)
    step(name, "tool stream", streamed_tool_call)
    step(name, "JSON schema", json_schema)
    step(name, "responses", responses)
    step(name, "resp. stream", streamed_response)


def with_langchain() -> None:
    def model(most: int) -> ChatOpenAI:
        return ChatOpenAI(
            base_url=URL, api_key=SecretStr(KEY), model=MODEL, max_tokens=most, temperature=0, max_retries=0
        )

    @tool
    def look_up(city: Literal["Paris", "London", "Rome"], capital: bool) -> str:
        """Look a place up."""
        return city

    def tool_call() -> str:
        answer = model(128).bind_tools([look_up], tool_choice="look_up", strict=True).invoke(ASK)
        return place_of(json.dumps(answer.tool_calls[0]["args"]))

    name = "langchain-openai"
    step(name, "chat", lambda: text_of(model(32).invoke(ASK).text))
    step(name, "stream", lambda: pieces_of(chunk.text for chunk in model(32).stream(ASK)))
    step(name, "tool call", tool_call)
    structured = model(128).with_structured_output(Place, method="json_schema")
    step(name, "JSON schema", lambda: structured.invoke(ASK).model_dump_json())


def with_litellm() -> None:
    base = {
        "model": f"openai/{MODEL}", "api_base": URL, "api_key": KEY, "messages": MESSAGES,
        "num_retries": 0, "temperature": 0,
    }  # fmt: skip
    name, complete = "litellm", litellm.completion
    step(name, "chat", lambda: text_of(complete(**base, max_tokens=32).choices[0].message.content))
    step(name, "stream", lambda: pieces_of(
        chunk.choices[0].delta.content for chunk in complete(**base, max_tokens=32, stream=True)
    ))  # fmt: skip

    def tool_call() -> str:
        answer = complete(**base, max_tokens=128, tools=[TOOL], tool_choice=FORCED)
        return place_of(answer.choices[0].message.tool_calls[0].function.arguments)

    def json_schema() -> str:
        answer = complete(**base, max_tokens=128, response_format=Place)
        return place_of(answer.choices[0].message.content)

    step(name, "tool call", tool_call)
    step(name, "JSON schema", json_schema)


def with_llm() -> None:
    """`llm` reads models of other servers from a file in its own directory."""
    directory = Path(os.environ["LLM_USER_PATH"])
    directory.mkdir(exist_ok=True)
    entry = {
        "model_id": "local", "model_name": MODEL, "api_base": URL, "api_key_name": "lowbit", "supports_schema": True
    }  # fmt: skip
    (directory / "keys.json").write_text(json.dumps({"lowbit": KEY}))
    (directory / "extra-openai-models.yaml").write_text(json.dumps([entry]))
    model, name = llm.get_model("local"), "llm"
    step(name, "chat", lambda: text_of(model.prompt(ASK, temperature=0, stream=False, max_tokens=32).text()))
    step(name, "stream", lambda: pieces_of(iter(model.prompt(ASK, temperature=0, max_tokens=32))))
    step(
        name,
        "JSON schema",
        lambda: place_of(model.prompt(ASK, temperature=0, schema=Place, max_tokens=128).text()),
    )


if __name__ == "__main__":
    with_openai()
    with_langchain()
    with_litellm()
    with_llm()

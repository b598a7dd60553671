"""The steps of a framework that builds agents, named as argument: instructor, pydantic-ai, openai-agents, llama-index.

Runs in the environment that run.py makes for it; prints one line of JSON for each step. `outcome` is `ok`, or `model`
where the framework refused what the model of 135 million parameters had written in an exchange that was sound (a tool
that is not `strict`, JSON without a schema), or `failed`. An answer with an error status is always `failed`.
"""

# each environment has one framework

import asyncio
import json
import os
import sys
from collections.abc import Callable
from typing import Any

from openai import APIError, AsyncOpenAI, OpenAI
from pydantic import BaseModel, ValidationError

URL, KEY, MODEL = os.environ["CLIENT_URL"], os.environ["CLIENT_KEY"], os.environ["CLIENT_MODEL"]
ASK = "Paris is a big city."
MODELS_TEXT = (ValidationError, json.JSONDecodeError)
MODELS_TEXT_NAMES = {  # the frameworks' own errors for it
    "InstructorRetryException", "IncompleteOutputException", "UnexpectedModelBehavior", "ModelBehaviorError",
    "MaxTurnsExceeded",
}  # fmt: skip


class City(BaseModel):
    """What the structured steps ask for."""

    name: str
    big: bool


def step(client: str, name: str, act: Callable[[], Any]) -> None:
    try:
        detail, outcome = str(act())[:200], "ok"
    except Exception as error:
        detail, outcome = f"{type(error).__name__}: {error}"[:400], outcome_of(error)
    line = {"client": client, "step": name, "ok": outcome != "failed", "outcome": outcome, "detail": detail}
    print(json.dumps(line), flush=True)


def outcome_of(error: BaseException | None) -> str:
    """`failed` where an error of HTTP is anywhere among the causes."""
    found, seen = "failed", []
    while error is not None and error not in seen:
        seen.append(error)
        if isinstance(error, APIError):
            return "failed"
        if isinstance(error, MODELS_TEXT) or type(error).__name__ in MODELS_TEXT_NAMES:
            found = "model"
        error = error.__cause__ or error.__context__
    return found


def with_instructor() -> None:
    import instructor

    def ask(mode: str, partial: bool = False) -> Any:
        client = instructor.from_openai(
            OpenAI(base_url=URL, api_key=KEY, max_retries=0), mode=getattr(instructor.Mode, mode)
        )
        given: dict[str, Any] = {
            "model": MODEL, "response_model": City, "max_retries": 1, "max_tokens": 100, "temperature": 0,
            "messages": [{"role": "user", "content": ASK}],
        }  # fmt: skip
        if partial:
            return list(client.chat.completions.create_partial(**given))[-1]
        return client.chat.completions.create(**given)

    for mode in ("JSON_SCHEMA", "TOOLS_STRICT", "TOOLS", "JSON", "MD_JSON"):
        step("instructor", mode, lambda mode=mode: ask(mode))  # type: ignore[misc]
    step("instructor", "partial stream", lambda: ask("JSON_SCHEMA", partial=True))


def with_pydantic_ai() -> None:
    import pydantic_ai
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=URL, api_key=KEY)
    chat, responses = (
        OpenAIChatModel(MODEL, provider=provider),
        OpenAIResponsesModel(MODEL, provider=provider),
    )

    def agent(output: Any = str, model: Any = chat) -> Any:
        settings = {"max_tokens": 100, "temperature": 0}
        return pydantic_ai.Agent(model, output_type=output, model_settings=settings, retries=0)

    def with_tool() -> Any:
        one = agent()

        @one.tool_plain
        def now() -> str:
            """The time."""
            return "12:00"

        return one.run_sync(ASK).output

    async def streamed() -> int:
        async with agent().run_stream(ASK) as run:
            return len([piece async for piece in run.stream_text(delta=True)])

    name = "pydantic-ai"
    step(name, "chat", lambda: agent().run_sync(ASK).output)
    step(name, "stream", lambda: asyncio.run(streamed()))
    step(name, "tool", with_tool)
    step(name, "tool output", lambda: agent(City).run_sync(ASK).output)
    step(name, "native output", lambda: agent(pydantic_ai.NativeOutput(City)).run_sync(ASK).output)
    step(name, "responses", lambda: agent(model=responses).run_sync(ASK).output)


def with_openai_agents() -> None:
    import agents

    agents.set_tracing_disabled(True)

    @agents.function_tool
    def now() -> str:
        """The time."""
        return "12:00"

    async def run(api: str, **given: Any) -> Any:
        client = AsyncOpenAI(base_url=URL, api_key=KEY, max_retries=0)
        kind = agents.OpenAIChatCompletionsModel if api == "chat" else agents.OpenAIResponsesModel
        settings = agents.ModelSettings(max_tokens=80, temperature=0)
        agent = agents.Agent(
            name="a", instructions="Be short.", model=kind(MODEL, client), model_settings=settings, **given
        )
        return (await agents.Runner.run(agent, ASK, max_turns=2)).final_output

    async def streamed(api: str) -> int:
        client = AsyncOpenAI(base_url=URL, api_key=KEY, max_retries=0)
        kind = agents.OpenAIChatCompletionsModel if api == "chat" else agents.OpenAIResponsesModel
        agent = agents.Agent(
            name="a", model=kind(MODEL, client), model_settings=agents.ModelSettings(max_tokens=30)
        )
        return len([event async for event in agents.Runner.run_streamed(agent, ASK).stream_events()])

    for api in ("chat", "responses"):
        step("openai-agents", api, lambda api=api: asyncio.run(run(api)))  # type: ignore[misc]
        step("openai-agents", f"{api} stream", lambda api=api: asyncio.run(streamed(api)))  # type: ignore[misc]
        step("openai-agents", f"{api} output", lambda api=api: asyncio.run(run(api, output_type=City)))  # type: ignore[misc]
        step("openai-agents", f"{api} tool", lambda api=api: asyncio.run(run(api, tools=[now])))  # type: ignore[misc]


def with_llama_index() -> None:
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai_like import OpenAILike

    def model(is_chat: bool = True) -> Any:
        return OpenAILike(
            model=MODEL, api_base=URL, api_key=KEY, is_chat_model=is_chat, max_tokens=20, context_window=2048
        )

    message = [ChatMessage(role="user", content=ASK)]
    step("llama-index", "chat", lambda: model().chat(message).message.content)
    step("llama-index", "stream", lambda: "".join(one.delta or "" for one in model().stream_chat(message)))
    step("llama-index", "completion", lambda: model(is_chat=False).complete("The sky is").text)


FRAMEWORKS = {
    "instructor": with_instructor,
    "pydantic-ai": with_pydantic_ai,
    "openai-agents": with_openai_agents,
    "llama-index": with_llama_index,
}


if __name__ == "__main__":
    FRAMEWORKS[sys.argv[1]]()

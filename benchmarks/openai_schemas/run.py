"""What a running `lowbit serve` answers, against the schemas that OpenAI publishes.

    python benchmarks/openai_schemas/run.py CHECKPOINT --openapi openapi.json --out RESULT.json

`openapi.json` is OpenAI's own document (github.com/openai/openai-openapi, MIT). Every answer, every event of every
stream and every error is validated against its component schema; the result lists each place that deviates, once.
"""

import argparse
import json
import re
import sys
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.endpoint import lowbit_serve, write_result  # noqa: E402

from lowbit_core.server_process import ServerProcess  # noqa: E402

MODEL = "smollm2"
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
CHAT = {"model": MODEL, "messages": MESSAGES, "max_tokens": 24, "temperature": 0}
TEXT = {"model": MODEL, "prompt": "The capital of France is", "max_tokens": 12, "temperature": 0}
INPUT = {"model": MODEL, "input": "What is the capital of France?", "max_output_tokens": 24, "temperature": 0}
PLACE = {
    "type": "object", "additionalProperties": False, "required": ["city"],
    "properties": {"city": {"type": "string", "enum": ["Paris", "London"]}},
}  # fmt: skip
TOOL = {"type": "function", "function": {"name": "look_up", "strict": True, "parameters": PLACE}}
FORCED = {
    "tools": [TOOL],
    "tool_choice": {"type": "function", "function": {"name": "look_up"}},
    "max_tokens": 64,
}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "place", "strict": True, "schema": PLACE}}
STREAMED = {"stream": True, "stream_options": {"include_usage": True}}
CHATS = {
    "plain": {},
    "two answers with log-probabilities": {"n": 2, "temperature": 1, "logprobs": True, "top_logprobs": 2},
    "tool call": FORCED,
    "JSON schema": {"response_format": SCHEMA, "max_tokens": 64},
    "seed and stop": {"seed": 7, "stop": ["."]},
}
ERRORS = {
    "no such model": ("/v1/chat/completions", CHAT | {"model": "other"}),
    "wrong type": ("/v1/chat/completions", CHAT | {"temperature": "hot"}),
    "no messages": ("/v1/chat/completions", {"model": MODEL}),
    "too long": ("/v1/completions", TEXT | {"max_tokens": 10_000_000}),
    "no such route": ("/v1/other", {}),
}
Answer = tuple[str, str, Any]  # name, schema, document


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--openapi", type=Path, required=True)
    parser.add_argument("--log", type=Path, default=Path("/tmp/lowbit-schemas.log"))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    components = json.loads(arguments.openapi.read_text(encoding="utf-8"))["components"]
    flags = ("--served-model-name", MODEL, "--tool-call-parser", "hermes")
    validated: Counter[str] = Counter()
    found: Counter[tuple[str, str]] = Counter()
    with lowbit_serve(arguments.checkpoint, arguments.log, *flags) as server:
        for name, schema, document in answers(server):
            validated[f"{name} ({schema})"] += 1
            for place, message in deviations(components, schema, document):
                found[place, message] += 1
    listed = [
        {"place": place, "message": message, "times": times}
        for (place, message), times in sorted(found.items())
    ]
    write_result(arguments.out, {"validated": dict(validated), "deviations": listed})
    for one in listed:
        print(f"{one['place']}: {one['message']} ({one['times']} times)")
    print(json.dumps({"documents": validated.total(), "deviations": len(listed)}))
    return 0


def answers(server: ServerProcess) -> Iterator[Answer]:
    """Everything that is asked, and what came back."""
    for name, changes in CHATS.items():
        body = CHAT | changes
        yield f"chat, {name}", "CreateChatCompletionResponse", ask(server, "/v1/chat/completions", body)
        for event in stream(server, "/v1/chat/completions", body | STREAMED):
            yield f"chat stream, {name}", "CreateChatCompletionStreamResponse", event
    for name, changes in {
        "plain": {},
        "log-probabilities": {"logprobs": 2, "n": 2, "temperature": 1},
    }.items():
        yield (
            f"completion, {name}",
            "CreateCompletionResponse",
            ask(server, "/v1/completions", TEXT | changes),
        )
        for event in stream(server, "/v1/completions", TEXT | changes | STREAMED):
            yield f"completion stream, {name}", "CreateCompletionResponse", event
    yield "response", "Response", ask(server, "/v1/responses", INPUT)
    for event in stream(server, "/v1/responses", INPUT | {"stream": True}):
        yield "response stream", "ResponseStreamEvent", event
    yield "models", "ListModelsResponse", ask(server, "/v1/models", None)
    yield "model", "Model", ask(server, f"/v1/models/{MODEL}", None)
    for name, (path, body) in ERRORS.items():
        yield f"error, {name}", "ErrorResponse", ask(server, path, body)


def call(server: ServerProcess, path: str, body: Any) -> bytes:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return bytes(answer.read())
    except urllib.error.HTTPError as error:
        return bytes(error.read())


def ask(server: ServerProcess, path: str, body: Any) -> Any:
    return json.loads(call(server, path, body))


def stream(server: ServerProcess, path: str, body: Any) -> Iterator[Any]:
    """The events of a stream, without its `[DONE]`."""
    lines = call(server, path, body).decode().splitlines()
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return (json.loads(one) for one in data if one != "[DONE]")


def deviations(components: dict[str, Any], schema: str, document: Any) -> Iterator[tuple[str, str]]:
    """Where a document is not what its schema says; array indices are stars, so that a place counts once."""
    if schema == "ResponseStreamEvent":
        schema = event_schema(components["schemas"], document["type"])
    validator = Draft202012Validator({"$ref": f"#/components/schemas/{schema}", "components": components})
    for error in validator.iter_errors(document):
        for deepest in leaves(error):
            place = re.sub(r"\[\d+\]", "[*]", deepest.json_path)
            yield f"{schema} {place}", re.sub(r"'[0-9a-f-]{20,}'", "…", deepest.message)[:160]


def event_schema(schemas: dict[str, Any], kind: str) -> str:
    """The schema of a stream's event by its type."""
    members = (one["$ref"].rpartition("/")[2] for one in schemas["ResponseStreamEvent"]["anyOf"])
    return next(name for name in members if kind in schemas[name]["properties"]["type"]["enum"])


def leaves(error: ValidationError) -> Iterator[ValidationError]:
    """The causes of an error: of alternatives, those of the one that comes closest (its `type` fits, fewest errors)."""
    branches: dict[Any, list[ValidationError]] = {}
    for cause in error.context or ():
        branches.setdefault(cause.relative_schema_path[0], []).append(cause)
    if not branches:
        yield error
        return
    closest = min(
        branches.values(), key=lambda one: (any(c.json_path.endswith(".type") for c in one), len(one))
    )
    for cause in closest:
        yield from leaves(cause)


if __name__ == "__main__":
    sys.exit(main())

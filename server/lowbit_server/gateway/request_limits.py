"""What one request may ask for, whoever asks: a model that there is, so much output, so long a prompt."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from lowbit_server.gateway.keys import Key
from lowbit_server.gateway.lease import Demand
from lowbit_server.gateway.openai_errors import ApiError
from lowbit_server.gateway.request_body import choices, output_tokens, prompt_characters, prompts
from lowbit_server.gateway.route_table import Route

CHARACTERS_PER_TOKEN = 4  # for the estimate that stands until the engine has counted
MODEL_CHARACTERS = 128


@dataclass(frozen=True)
class ServerLimits:
    """The server's own limits; None is without limit."""

    max_num_queued_reqs: int
    max_header_bytes: int
    max_body_bytes: int
    max_prompt_characters: int | None
    max_output_tokens: int | None
    request_timeout_s: float | None


@dataclass(frozen=True)
class Models:
    """Which names `model` may hold; a request without one gets `default`."""

    default: str
    known: Callable[[str], bool]

    def name_in(self, document: dict[str, Any], key: Key) -> str:
        """The model that a request asks for; raises ApiError where there is none or the key may not use it."""
        given = document.get("model")
        model = given if isinstance(given, str) and given else self.default
        if not self.known(model):
            message = f"there is no model {model[:MODEL_CHARACTERS]!r} here; /v1/models lists those there are"
            raise ApiError(404, message, "no_such_model", code="model_not_found", param="model")
        if key.models is not None and model not in key.models:
            message = f"the key {key.name!r} may not use the model {model!r}"
            raise ApiError(403, message, "model", code="model_not_found", param="model")
        return model


def demand_of_all(works: Iterable[tuple[dict[str, Any], Route]], limits: ServerLimits) -> Demand:
    """What the requests of one body ask for together; raises ApiError where one asks for more than is allowed."""
    demands = [demand_of(document, route, limits) for document, route in works]
    if len(demands) == 1:
        return demands[0]
    return Demand(
        prompts=sum(one.prompts for one in demands),
        choices=max(one.choices for one in demands),
        of_month=any(one.of_month for one in demands),
        prompt_tokens=sum(one.prompt_tokens for one in demands),
        output_tokens=sum(one.output_tokens for one in demands),
        default_tokens=sum(one.default_tokens for one in demands),
    )


def demand_of(document: dict[str, Any], route: Route, limits: ServerLimits) -> Demand:
    """What a request asks for; raises ApiError where that is more than is allowed. A limit is for each prompt."""
    number, many, size = prompts(document, route), choices(document), prompt_characters(document)
    stated = output_tokens(document)
    most, longest = limits.max_output_tokens, limits.max_prompt_characters
    if most is not None and stated is not None and stated * many > most:
        message = f"{stated * many} output tokens are asked for; this server allows {most}"
        raise ApiError(400, message, "max_tokens", code="max_tokens_too_large", param="max_tokens")
    if longest is not None and size > longest:
        message = f"the prompt has {size} characters; this server allows {longest}"
        raise ApiError(400, message, "prompt_size", code="context_length_exceeded", param=route.prompt)
    if route.cost != "tokens":
        return Demand(number)
    return Demand(
        number,
        many,
        of_month=True,
        prompt_tokens=size // CHARACTERS_PER_TOKEN,
        output_tokens=(stated or 0) * many * number,
        default_tokens=(most or 0) * many * number if stated is None else 0,
    )

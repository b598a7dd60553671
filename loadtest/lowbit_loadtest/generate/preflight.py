"""What is asked before a run: is the server there, may we, and which model is it?

A server need not list its models, nor an adapter that it would load: with `--model` the run goes on, and a warning says
so. A model that is not among those listed is asked a few tokens, so that a wrong name is refused here.
"""

from typing import Any

import httpx

from lowbit_core.errors import ConfigError
from lowbit_core.log import get_logger
from lowbit_loadtest.generate.client import Client, describe, redirect_text
from lowbit_loadtest.generate.http.target import Target
from lowbit_loadtest.generate.records import Outcome
from lowbit_loadtest.generate.request import Request

PREFLIGHT_TIMEOUT_S = 10.0
NOT_READY = (502, 503, 504)
MOST_SHOWN = 20
FEW_TOKENS = 16  # OpenAI's /v1/responses takes no fewer

log = get_logger("loadtest")


async def find_model(http: httpx.AsyncClient, target: Target, timeout_s: float = PREFLIGHT_TIMEOUT_S) -> str:
    """The target's model, or the first that the server lists if it has none; ConfigError if that is not to be had."""
    served = await served_models(http, target, timeout_s)
    wanted = target.model
    if served is not None and wanted not in served:
        if not wanted:
            return served[0]
        await _try(http, target, served)
    return wanted


async def served_models(
    http: httpx.AsyncClient, target: Target, timeout_s: float = PREFLIGHT_TIMEOUT_S
) -> list[str] | None:
    """The models that the server lists; None where it has no list, and the target names a model. ConfigError where it
    cannot be asked at all."""
    try:
        response = await http.get("models", timeout=timeout_s)
    except (httpx.HTTPError, OSError, httpx.InvalidURL) as error:
        raise ConfigError(_unreachable(target, describe(error))) from error
    status = response.status_code
    if status == 401 or (status == 403 and not target.model):
        raise ConfigError(f"--target {target.shown} refuses the API key ({status}); {_key_advice(target)}")
    if response.is_redirect:
        raise ConfigError(f"--target {target.shown}, {_models_path(http)}: {redirect_text(response)}")
    if response.is_success and (names := _names(response)):
        return names
    ready = status not in NOT_READY
    if target.model and ready:
        log.warning("%s lists no models (%d): %s is asked all the same", target.shown, status, target.model)
        return None
    advice = ", or --model NAME if it lists none" if ready else " that is ready"
    raise ConfigError(
        f"--target {target.shown} lists no model at {_models_path(http)} (status {status}); "
        f"give the root URL of an OpenAI-compatible server{advice}"
    )


async def _try(http: httpx.AsyncClient, target: Target, served: list[str]) -> None:
    """Ask an unlisted model a few tokens: an adapter that the server loads when it is named answers."""
    hello = Request(({"role": "user", "content": "Hello"},), max_tokens=FEW_TOKENS, temperature=0.0, seed=0)
    record = await Client(http, target).complete(hello)
    if record.outcome is not Outcome.FAILED:
        log.warning("%s is not among the models that %s lists, but it answers", target.model, target.shown)
        return
    shown = ", ".join(served[:MOST_SHOWN]) + (", …" if len(served) > MOST_SHOWN else "")
    raise ConfigError(
        f"--model {target.model!r} is not served at {target.shown} ({record.detail}); served are: {shown}"
    )


def _names(response: httpx.Response) -> list[str]:
    """OpenAI's `data`, a bare list (Together), or Ollama's `models`."""
    try:
        body = response.json()
        rows = body if isinstance(body, list) else body.get("data") or body.get("models") or []
        return [str(name) for row in rows if (name := _name(row))]
    except (ValueError, TypeError, AttributeError):
        return []


def _name(row: Any) -> Any:
    return row if isinstance(row, str) else row.get("id") or row.get("name") or row.get("model")


def _unreachable(target: Target, why: str) -> str:
    if "CERTIFICATE_VERIFY_FAILED" in why:
        advice = "trust it with --ca-file CA.pem or SSL_CERT_FILE, or do not check it with --insecure"
        return f"--target {target.shown} has a certificate that is not trusted ({why}); {advice}"
    through = f" through the proxy {target.proxy}" if target.proxy else ""
    return f"--target {target.shown} does not answer{through} ({why}); is the server up?"


def _key_advice(target: Target) -> str:
    if target.api_key is None:
        return "set LOWBIT_API_KEY"
    return f"it was sent as {target.key_header_name}; set LOWBIT_API_KEY, or --key-header NAME for another header"


def _models_path(http: httpx.AsyncClient) -> str:
    return f"{http.base_url.path}models"

"""The key that a request presents: as OpenAI's clients send it, as Anthropic's do, or as Azure's.

A request may hold the same key in several headers. Two different ones are refused, because which of them counts would
be this server's guess.
"""

from starlette.datastructures import Headers

from lowbit_server.gateway.openai_errors import ApiError

KEY_HEADERS = ("authorization", "x-api-key", "api-key")


def presented_key(headers: Headers) -> str:
    """The one key in a request's headers, empty where there is none; raises ApiError 401 where there are several."""
    found: dict[str, str] = {}
    for name in KEY_HEADERS:
        for value in headers.getlist(name):
            if key := _bearers(value) if name == "authorization" else value.strip():
                found.setdefault(key, name)
    if len(found) > 1:
        first, second = list(found.values())[:2]
        where = f"the header {first} holds" if first == second else f"the headers {first} and {second} hold"
        raise refused(f"{where} two different API keys; send one")
    return next(iter(found), "")


def refused(message: str) -> ApiError:
    """401, which says what is wrong with the key."""
    return ApiError(401, message, "key", headers={"www-authenticate": "Bearer"})


def _bearers(value: str) -> str:
    """The token of `Bearer TOKEN`; another scheme is a proxy's and holds no key of ours."""
    scheme, _, token = value.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""

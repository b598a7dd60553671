"""The one table of routes: path, methods, who may ask, what it costs, and the shape of its errors.

The gateway, the list of allowed routes, the OpenAPI document and docs/server.md read only this. A route of vLLM that
stands neither in ROUTES nor in CLOSED is removed, and a contract test fails until it stands in one of them.
"""

from dataclasses import dataclass
from typing import Literal

Access = Literal["everyone", "key", "admin"]  # admin: a key with `admin: true`, or anybody on the admin port
Cost = Literal["nothing", "request", "tokens"]  # tokens: a request, and the tokens that the engine counts
# state: a probe's own; responses: its stream's events
ErrorShape = Literal["openai", "responses", "anthropic", "state"]


@dataclass(frozen=True)
class Route:
    """A route that is answered. `prompt`: the body's field that is the prompt; `batch`: those that may hold several.

    What costs something is work for the engine: a POST with a JSON body, which takes places and counts in limits.
    """

    path: str
    methods: tuple[str, ...]
    what: str
    access: Access = "key"
    cost: Cost = "nothing"
    errors: ErrorShape = "openai"
    prompt: str | None = None
    batch: tuple[str, ...] = ()
    ours: bool = False


GET, POST = ("GET",), ("POST",)
# The fields of pairs of texts, by the names that vLLM takes.
SCORED = ("queries", "documents", "items", "text_1", "text_2", "data_1", "data_2")
RANKED = ("query", "documents")
SCORES = "scores of pairs of texts, where the model embeds or ranks"
RANKS = "documents by nearness to a query, where the model embeds or ranks"
INVOCATIONS = Route(
    "/invocations", POST, "any of the above, told by its fields ([clouds](deploy.md#clouds))", cost="tokens",
    prompt="messages", ours=True,
)  # fmt: skip
ROUTES = (
    Route("/v1/chat/completions", POST, "chat", cost="tokens", prompt="messages"),
    Route(
        "/v1/completions", POST, "completions of one text or several", cost="tokens", prompt="prompt", batch=("prompt",)
    ),
    Route("/v1/responses", POST, "the Responses API", cost="tokens", errors="responses", prompt="input"),
    Route("/v1/responses/{response_id}", GET, "a stored response", errors="responses"),
    Route("/v1/responses/{response_id}/cancel", POST, "end a response", errors="responses"),
    Route("/v1/messages", POST, "Anthropic's Messages API", cost="tokens", errors="anthropic", prompt="messages"),
    Route(
        "/v1/messages/count_tokens", POST, "how many tokens such a request has", cost="request", errors="anthropic",
        prompt="messages",
    ),
    Route(
        "/v1/embeddings", POST, "embeddings, where the model has them", cost="tokens", prompt="input", batch=("input",)
    ),
    Route("/pooling", POST, "what such a model pools, as it is", cost="tokens", prompt="input", batch=("input",)),
    Route("/v1/score", POST, SCORES, cost="tokens", prompt="documents", batch=SCORED),
    Route("/score", POST, "the same", cost="tokens", prompt="documents", batch=SCORED),
    Route("/v1/rerank", POST, RANKS, cost="tokens", prompt="documents", batch=RANKED),
    Route("/v2/rerank", POST, "the same, as Cohere's clients ask", cost="tokens", prompt="documents", batch=RANKED),
    Route("/rerank", POST, "the same", cost="tokens", prompt="documents", batch=RANKED),
    INVOCATIONS,
    Route("/tokenize", POST, "text or messages as token ids", cost="request", prompt="prompt"),
    Route("/detokenize", POST, "token ids as text", cost="request", prompt="tokens"),
    Route("/v1/models", GET, "the model, its other names and its loaded adapters, with what was measured", ours=True),
    Route("/v1/models/{model:path}", GET, "one of them; its name may hold slashes", ours=True),
    Route("/startupz", GET, "whether the engine is loaded", access="everyone", errors="state", ours=True),
    Route("/livez", GET, "whether the engine lives", access="everyone", errors="state", ours=True),
    Route("/readyz", GET, "whether requests are taken", access="everyone", errors="state", ours=True),
    Route("/ping", GET, "the same, as SageMaker asks it", access="everyone", errors="state", ours=True),
    Route("/health", GET, "vLLM's own probe", access="everyone", errors="state"),
    Route("/version", GET, "vLLM's version", access="everyone", errors="state"),
    Route("/metrics", GET, "[metrics](metrics.md) of vLLM and of Lowbit", access="admin", ours=True),
    Route("/lowbit/checkpoint", GET, "the checkpoint as measured, the engine as it runs", access="admin", ours=True),
    Route("/lowbit/live", GET, "[the load](metrics.md#the-pages-feed) of this moment, as the page draws it", ours=True),
    Route("/lowbit/proof", GET, "what was proven of the checkpoint, as the page shows it", ours=True),
    Route("/openapi.json", GET, "this API as an OpenAPI document", access="admin"),
)  # fmt: skip
UNLISTED = Route("", (), "what no route has", access="key")  # a 404 is for those with a key
UNLISTED_MESSAGES = Route(
    "", (), "what Anthropic's API has and vLLM does not", access="key", errors="anthropic"
)

# Routes of the versions of vLLM that pyproject.toml allows which are removed: (path, methods).
CLOSED: dict[str, tuple[str, ...]] = {
    "/abort_requests": POST,
    "/classify": POST,  # models with a head for classes, which `lowbit quantize` does not read
    "/cohere/v2/chat": POST,
    "/cohere/v2/chat/render": POST,
    "/docs": GET,
    "/docs/oauth2-redirect": GET,
    "/generative_scoring": POST,
    "/inference/v1/abort_requests": POST,
    "/inference/v1/generate": POST,
    "/invocations": POST,  # ours takes its place: its limits are those of the route that answers
    "/is_scaling_elastic_ep": POST,
    "/kv_event_sources": GET,
    "/load": GET,
    "/metrics": ("MOUNT", "GET"),  # ours takes its place
    "/ping": ("GET", "POST"),  # ours takes its place: it says whether requests are taken
    "/redoc": GET,
    "/scale_elastic_ep": POST,
    "/start_profile": POST,
    "/stop_profile": POST,
    "/tokenizer_info": GET,
    # Forms with a file and not JSON, of which no limit could be told before vLLM reads them; and models of speech have
    # parts that `lowbit quantize` does not read.
    "/v1/audio/transcriptions": POST,
    "/v1/audio/translations": POST,
    "/v1/chat/completions/batch": POST,
    "/v1/chat/completions/derender": POST,
    "/v1/chat/completions/render": POST,
    "/v1/completions/derender": POST,
    "/v1/completions/render": POST,
    "/v1/decisions": POST,  # from 0.33 on
    "/v1/load_lora_adapter": POST,
    "/v1/messages/render": POST,
    "/v1/models": GET,  # ours takes its place
    "/v1/realtime": ("WEBSOCKET",),
    "/v1/responses/render": POST,
    "/v1/systemone": POST,
    "/v1/unload_lora_adapter": POST,
    "/v2/embed": POST,  # Cohere's, with fields for pictures: /v1/embeddings is what clients have in common
}

BY_PATH = {route.path: route for route in ROUTES}


def route_at(path: str) -> Route:
    """The route at a path as it was asked for.

    Those with a parameter are UNLISTED here: a test holds that they need a key and cost nothing, as UNLISTED does.
    """
    return BY_PATH.get(path) or (UNLISTED_MESSAGES if path.startswith("/v1/messages/") else UNLISTED)


def paths_for(access: Access) -> frozenset[str]:
    """The paths that one kind of caller may ask for."""
    return frozenset(route.path for route in ROUTES if route.access == access)


def is_allowed(path: str, methods: frozenset[str]) -> bool:
    """Whether a route that vLLM registers is answered: its path and each of its methods stand in the table."""
    route = BY_PATH.get(path)
    return route is not None and not route.ours and methods - {"HEAD"} <= set(route.methods)


def is_decided(path: str, method: str) -> bool:
    """Whether a route of vLLM stands in the table, as one that is answered or as one that is removed."""
    allowed = is_allowed(path, frozenset({method}))
    return allowed or method in CLOSED.get(path, ())


def in_markdown() -> str:
    """The table as docs/server.md shows it."""
    rows = ["| path | methods | who may | costs | |", "|---|---|---|---|---|"]
    costs = {"nothing": "", "request": "a request", "tokens": "a request, tokens"}
    for route in ROUTES:
        batch = "; each text counts as one" if route.batch else ""
        path = route.path.replace(":path", "")
        row = f"`{path}`", ", ".join(route.methods), route.access, costs[route.cost] + batch, route.what
        rows.append(f"| {' | '.join(row)} |")
    return "\n".join(rows)

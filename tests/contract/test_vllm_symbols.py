"""Each vLLM symbol that the server relies on, by name, in the installed vLLM; test_vllm_facts.py has other versions."""

import importlib
import inspect
import platform
from importlib.util import find_spec

import pytest
import torch
from fastapi import FastAPI
from tests.contract.vllm_needs import ATTRIBUTES, MAKE_ARG_PARSER, PARAMETERS, SYMBOLS

from lowbit_server.gateway.response import QUEUE_FULL
from lowbit_server.gateway.route_table import ROUTES, is_decided
from lowbit_server.routes import keep_allowed_routes

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")


def resolve(symbol: str) -> object:
    module, _, path = symbol.partition(":")
    found: object = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    return found


def _first(places: tuple[str, ...]) -> object:
    """The symbol at the first of its places that there is."""
    for place in places[:-1]:
        try:
            return resolve(place)
        except ModuleNotFoundError:
            continue
    return resolve(places[-1])


@pytest.mark.parametrize("places", SYMBOLS)
def test_symbol_exists(places: tuple[str, ...]) -> None:
    _first(places)


@pytest.mark.parametrize(("places", "names"), PARAMETERS)
def test_callable_takes_the_parameters_we_pass(places: tuple[str, ...], names: set[str]) -> None:
    found = _first(places)
    assert callable(found)
    assert names <= inspect.signature(found).parameters.keys()


@pytest.mark.parametrize(("module", "text"), ATTRIBUTES)
def test_attribute_read_by_name_is_still_set_there(module: str, text: str) -> None:
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    with open(spec.origin, encoding="utf-8") as source:
        assert text in source.read()


def test_worker_extension_hides_nothing_of_vllms_worker() -> None:
    worker = resolve("vllm.v1.worker.gpu_worker:Worker")
    extension = resolve("lowbit_server.engine.worker:WorkerExtension")
    ours = {name for name in vars(extension) if not name.startswith("__")}
    assert ours == {
        "lowbit_kv_scales",
        "lowbit_input_scales",
        "lowbit_memory",
        "lowbit_layers",
    }
    assert not ours & set(dir(worker))


def test_a_full_queue_reads_as_the_gateway_expects() -> None:
    exceptions = importlib.import_module("vllm.exceptions")
    for error, mark in zip(
        (exceptions.QueueOverflowError(), exceptions.MaxQueuedTokensError()), QUEUE_FULL, strict=True
    ):
        assert error.http_status == 503
        assert mark.decode() in str(error)


def app_of_all_tasks() -> FastAPI:
    """An app with every route that the installed vLLM registers for some model."""
    parser = importlib.import_module("vllm.utils.argparse_utils").FlexibleArgumentParser()
    make_arg_parser = _first(MAKE_ARG_PARSER)
    assert callable(make_arg_parser)
    routers = importlib.import_module("vllm.entrypoints.launchers.api_server.routers")
    app = FastAPI()
    app.state.args = make_arg_parser(parser).parse_args([])
    routers.register_api_routers(
        app.state.args, app, ("generate", "embed", "transcription", "realtime"), None
    )
    return app


def registered_routes() -> set[tuple[str, str]]:
    """(path, method) of each route that the installed vLLM registers."""
    return {
        (route.path, method)
        for route in app_of_all_tasks().router.routes
        if hasattr(route, "path")
        for method in (
            getattr(route, "methods", None) or {"WEBSOCKET" if "realtime" in route.path else "MOUNT"}
        )
    }


def test_every_route_of_vllm_stands_in_the_table() -> None:
    undecided = {one for one in registered_routes() if one[1] != "HEAD" and not is_decided(*one)}
    assert undecided == set()


def test_only_routes_of_the_table_are_left() -> None:
    app = app_of_all_tasks()
    keep_allowed_routes(app)
    left = {getattr(route, "path", "") for route in app.router.routes}
    assert left <= {route.path for route in ROUTES if not route.ours}
    assert {"/v1/chat/completions", "/v1/responses", "/tokenize", "/health"} <= left


def test_this_machine_is_asked_for_expert_kernels_as_vllm_asks_it() -> None:
    runs = resolve("lowbit_server.engine.vllm_engine:runs_quantized_experts")
    assert callable(runs)
    cpu = resolve("vllm.platforms:current_platform.is_cpu")
    assert callable(cpu)
    assert runs(4, 64) in (True, False)
    if cpu():
        assert not runs(8, 64)  # vLLM has no kernel for experts of 8 bits and plain inputs on a CPU
        assert not runs(8, -1, "float")  # nor for FP8 ones with a scale a channel
        if platform.machine() == "x86_64" and find_spec("zentorch") is None:
            assert runs(8, -1, "int") is torch.cpu._is_amx_tile_supported()


def test_this_machine_is_asked_for_kernels_of_fp8_in_blocks_as_vllm_asks_it() -> None:
    runs = resolve("lowbit_server.engine.vllm_engine:runs_fp8_blocks")
    cpu = resolve("vllm.platforms:current_platform.is_cpu")
    assert callable(runs)
    assert callable(cpu)
    if cpu():
        assert runs() is (platform.machine() == "x86_64" and torch.cpu._is_amx_tile_supported())

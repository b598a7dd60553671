"""What our code needs is in every vLLM that pyproject.toml allows, by the facts that scripts/vllm_facts.py extracted.

The file says what the sources of a wheel hold. So that it can be trusted, the installed vLLM is held against it.
"""

import ast
import json
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from tests.contract.vllm_needs import ATTRIBUTES, PARAMETERS, SYMBOLS

from lowbit_server.gateway.route_table import ROUTES, is_decided

ROOT = Path(__file__).resolve().parents[2]
FACTS: dict[str, Any] = json.loads(Path(__file__).with_name("vllm_facts.json").read_text())
EXTRAS: dict[str, list[str]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
    "optional-dependencies"
]
MODULES = ("vllm_engine", "worker")  # of lowbit_server.engine: the only two that import vLLM


def _engine_of(extra: str) -> Requirement:
    return next(one for one in map(Requirement, EXTRAS[extra]) if one.name.startswith("vllm"))


def _of(found: str) -> Requirement:
    return next(one for one in map(Requirement, EXTRAS["quantize"]) if one.name == found)


@pytest.fixture(params=sorted(FACTS))
def facts(request: pytest.FixtureRequest) -> Any:
    return FACTS[request.param]


def test_every_allowed_version_has_its_facts() -> None:
    gpu, cpu = _engine_of("gpu"), _engine_of("cpu")
    assert [one for one in FACTS if gpu.specifier.contains(one)] == sorted(FACTS)
    newest = max(map(Version, FACTS))
    assert not gpu.specifier.contains(f"{newest.major}.{newest.minor + 1}.0")
    assert [one for one in FACTS if cpu.specifier.contains(one)] == ["0.32.0"]


@pytest.mark.parametrize("places", SYMBOLS)
def test_each_symbol_is_at_one_of_its_places(facts: Any, places: tuple[str, ...]) -> None:
    assert any(facts["symbols"][place] for place in places)


@pytest.mark.parametrize(("places", "names"), PARAMETERS)
def test_each_callable_takes_the_parameters_that_we_pass(
    facts: Any, places: tuple[str, ...], names: set[str]
) -> None:
    assert any(names <= set(facts["parameters"][place]) for place in places)


@pytest.mark.parametrize(("module", "text"), ATTRIBUTES)
def test_each_attribute_is_still_set_there(facts: Any, module: str, text: str) -> None:
    assert facts["attributes"][f"{module}: {text}"]


def test_a_place_that_no_version_has_is_not_kept() -> None:
    kept = {place for places in SYMBOLS for place in places}
    assert {place for place in kept if any(one["symbols"][place] for one in FACTS.values())} == kept


def test_our_two_modules_import_nothing_else_of_vllm() -> None:
    everything = [*SYMBOLS, *(places for places, _ in PARAMETERS)]
    names = {tuple(place.replace(":", ".").split(".")) for places in everything for place in places}
    for module in MODULES:
        source = (ROOT / f"server/lowbit_server/engine/{module}.py").read_text()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm"):
                for alias in node.names:
                    imported = (*(node.module or "").split("."), alias.name)
                    assert any(name[: len(imported)] == imported for name in names), imported


def test_torch_and_transformers_may_be_those_that_each_version_wants(facts: Any) -> None:
    torch = Requirement("torch" + facts["requires"]["torch"])
    wanted = next(iter(torch.specifier)).version
    assert _of("torch").specifier.contains(wanted)
    both = (
        _of("transformers").specifier
        & Requirement("transformers" + facts["requires"]["transformers"]).specifier
    )
    assert any(both.contains(f"5.{minor}.{patch}") for minor in range(16, 30) for patch in range(3))
    assert str(_of("compressed-tensors").specifier) == facts["requires"]["compressed-tensors"]


def test_every_route_of_each_version_stands_in_the_table(facts: Any) -> None:
    """A new vLLM fails here until gateway/route_table.py says of each new route whether it is answered."""
    registered = {(path, method) for path, methods in facts["routes"].items() for method in methods}
    assert {one for one in registered if not is_decided(*one)} == set()


def test_every_route_of_the_table_that_is_vllms_is_in_each_version(facts: Any) -> None:
    ours_or_fastapis = {"/openapi.json"}
    for route in ROUTES:
        if not route.ours and route.path not in ours_or_fastapis:
            assert set(route.methods) <= set(facts["routes"][route.path])


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_the_file_says_of_the_installed_version_what_running_it_says() -> None:
    from tests.contract.test_vllm_symbols import registered_routes, resolve

    installed = FACTS[str(resolve("vllm.version:__version__")).partition("+")[0]]
    for place, module in installed["symbols"].items():
        try:
            resolve(place)
        except (ModuleNotFoundError, AttributeError):
            there = False
        else:
            there = True
        assert there == (module is not None), place
    documents = {"/docs", "/docs/oauth2-redirect", "/openapi.json", "/redoc"}  # FastAPI's own
    assert {path for path, _ in registered_routes()} - documents <= installed["routes"].keys()

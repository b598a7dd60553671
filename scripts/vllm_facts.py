"""What our code needs of vLLM, looked up in its wheels without installing them.

    pip download --no-deps vllm==0.32.0 vllm==0.33.0 -d WHEELS
    python scripts/vllm_facts.py WHEELS/vllm-*.whl

Reads each wheel's Python source and writes to tests/contract/vllm_facts.json, by version: what it requires, where each
symbol of tests/contract/vllm_needs.py is and which parameters it takes, which attribute reads are backed by its source,
and the routes that its API server registers. The tests of tests/contract hold the file against our code, and the
installed vLLM against the file. Nothing of vLLM is imported or run; what only running can tell (a name that a module's
`__getattr__` makes) counts as there.
"""

import argparse
import ast
import json
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.parser import Parser
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.contract.vllm_needs import ATTRIBUTES, PARAMETERS, SYMBOLS  # noqa: E402

OUT = ROOT / "tests" / "contract" / "vllm_facts.json"
REQUIRED = (
    "torch",
    "transformers",
    "compressed-tensors",
    "fastapi[standard]",
    "starlette",
    "prometheus_client",
)
ROUTER_OF_ALL = "vllm.entrypoints.launchers.api_server.routers"
ASKED_FOR = ("VLLM_SERVER_DEV_MODE", "enable_fault_tolerance")  # routes that only these switches open
VERBS = (
    "get",
    "post",
    "put",
    "delete",
    "head",
    "patch",
    "options",
    "websocket",
    "api_route",
    "add_api_route",
    "Mount",
)
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Wheel:
    """The sources in a wheel, by module."""

    archive: zipfile.ZipFile
    names: frozenset[str] = field(hash=False)

    @classmethod
    def open(cls, path: Path) -> "Wheel":
        archive = zipfile.ZipFile(path)
        return cls(archive, frozenset(archive.namelist()))

    @cache  # noqa: B019  # one wheel after the other, in a script
    def file_of(self, module: str) -> str | None:
        base = module.replace(".", "/")
        return next((name for name in (f"{base}.py", f"{base}/__init__.py") if name in self.names), None)

    @cache  # noqa: B019
    def source(self, module: str) -> str:
        name = self.file_of(module)
        return "" if name is None else self.archive.read(name).decode()

    @cache  # noqa: B019
    def tree(self, module: str) -> ast.Module:
        return ast.parse(self.source(module))

    def imported_from(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        is_package = (self.file_of(module) or "").endswith("/__init__.py")
        parts = module.split(".")
        kept = parts[: len(parts) - node.level + is_package]
        return ".".join([*kept, *([node.module] if node.module else [])])

    def metadata(self) -> Any:
        name = next(name for name in self.names if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(self.archive.read(name).decode())


@dataclass(frozen=True)
class Found:
    """A definition and the module that holds it; no node for a name that only running can tell."""

    module: str
    node: ast.AST | None


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheels", type=Path, nargs="+")
    facts = {}
    for path in parser.parse_args().wheels:
        wheel = Wheel.open(path)
        facts[wheel.metadata()["version"]] = facts_of(wheel)
    OUT.write_text(json.dumps(dict(sorted(facts.items())), indent=1) + "\n", encoding="utf-8")
    for version, found in sorted(facts.items()):
        missing = [name for name, there in found["symbols"].items() if there is None]
        print(f"{version}: {len(found['routes'])} routes; missing: {missing or 'nothing'}")
    return 0


def facts_of(wheel: Wheel) -> dict[str, Any]:
    symbols = {choice for needed in SYMBOLS for choice in needed}
    return {
        "requires": requirements(wheel),
        "symbols": {symbol: place(wheel, symbol) for symbol in sorted(symbols)},
        "parameters": {place: parameters(wheel, place) for places, _ in PARAMETERS for place in places},
        "attributes": {f"{module}: {text}": text in wheel.source(module) for module, text in ATTRIBUTES},
        "routes": {path: sorted(methods) for path, methods in sorted(routes(wheel).items())},
    }


def requirements(wheel: Wheel) -> dict[str, str]:
    lines = [line.partition(";")[0].strip() for line in wheel.metadata().get_all("Requires-Dist")]
    return {
        name: line[len(name) :]
        for name in REQUIRED
        for line in lines
        if line.startswith(name) and line[len(name) : len(name) + 1] in ("", "=", "<", ">")
    }


def place(wheel: Wheel, symbol: str) -> str | None:
    """The module where a symbol is defined, or None."""
    found = resolve(wheel, symbol)
    return None if found is None else found.module


def resolve(wheel: Wheel, symbol: str) -> Found | None:
    """`module:Class.member`, through imports and base classes."""
    module, _, path = symbol.partition(":")
    found: Found | None = None
    for name in path.split("."):
        found = in_module(wheel, module, name) if found is None else in_class(wheel, found, name)
        if found is None or found.node is None:
            return found
    return found


def in_module(wheel: Wheel, module: str, name: str) -> Found | None:
    for node in flat(wheel.tree(module).body):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    source = wheel.imported_from(module, node)
                    if wheel.file_of(f"{source}.{alias.name}"):
                        return Found(f"{source}.{alias.name}", None)
                    return in_module(wheel, source, alias.name)
        elif name in defined(node):
            return Found(module, node)
    made = [one for one in wheel.tree(module).body if isinstance(one, Function) and one.name == "__getattr__"]
    return Found(module, None) if made and name in wheel.source(module) else None


def in_class(wheel: Wheel, found: Found, name: str) -> Found | None:
    node = found.node
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        return Found(found.module, None)  # an instance: running tells
    if not isinstance(node, ast.ClassDef):
        return None
    for one in node.body:
        if name in defined(one) or (isinstance(one, Function) and sets_attribute(one, name)):
            return Found(found.module, one)
    for base in node.bases:
        parent = in_module(wheel, found.module, base.id) if isinstance(base, ast.Name) else None
        if parent is not None and (inherited := in_class(wheel, parent, name)):
            return inherited
    return None


def flat(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a module, those under `if` and `try` too."""
    for node in body:
        yield node
        for part in ("body", "orelse", "finalbody", "handlers"):
            if isinstance(node, (ast.If, ast.Try, ast.ExceptHandler, ast.With)):
                yield from flat(getattr(node, part, []))


def defined(node: ast.AST) -> set[str]:
    if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    names = [one for target in targets if target for one in ast.walk(target) if isinstance(one, ast.Name)]
    return {one.id for one in names} if isinstance(node, (ast.Assign, ast.AnnAssign)) else set()


def sets_attribute(function: Function, name: str) -> bool:
    return any(
        isinstance(node, ast.Attribute) and node.attr == name and isinstance(node.ctx, ast.Store)
        for node in ast.walk(function)
    )


def parameters(wheel: Wheel, symbol: str) -> list[str]:
    """A function's parameters, or a class's: those of `__init__`, or its dataclass fields."""
    found = resolve(wheel, symbol)
    if found is None or found.node is None:
        return []
    if isinstance(found.node, ast.ClassDef):
        made = in_class(wheel, found, "__init__")
        return fields_of(wheel, found) if made is None else arguments_of(made.node)
    return arguments_of(found.node)


def fields_of(wheel: Wheel, found: Found) -> list[str]:
    node = found.node
    assert isinstance(node, ast.ClassDef)
    parents = [in_module(wheel, found.module, base.id) for base in node.bases if isinstance(base, ast.Name)]
    inherited = [name for one in parents if one and one.node for name in fields_of(wheel, one)]
    return inherited + [name for one in node.body if isinstance(one, ast.AnnAssign) for name in defined(one)]


def arguments_of(node: ast.AST | None) -> list[str]:
    if not isinstance(node, Function):
        return []
    return [one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]


def routes(wheel: Wheel) -> dict[str, set[str]]:
    """Paths and methods of all modules that `register_api_routers` reaches without a developer's switches."""
    found: dict[str, set[str]] = {}
    todo, seen = [ROUTER_OF_ALL], set()
    while todo:
        module = todo.pop()
        if module in seen:
            continue
        seen.add(module)
        for node in reached(wheel.tree(module)):
            if isinstance(node, ast.ImportFrom) and any("router" in one.name for one in node.names):
                todo.append(wheel.imported_from(module, node))
            elif isinstance(node, ast.Call):
                for path, methods in declared(node):
                    found.setdefault(path, set()).update(methods)
    return found


def reached(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and any(switch in ast.unparse(node.test) for switch in ASKED_FOR):
            continue
        if isinstance(node, Function) and "_dev_" in node.name:
            continue
        yield node
        yield from reached(node)


def declared(call: ast.Call) -> Iterator[tuple[str, set[str]]]:
    """`@router.post("/path")` or `app.add_api_route("/path", …, methods=[…])`."""
    verb = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if verb not in VERBS or not call.args:
        return
    first = call.args[0]
    if not (isinstance(first, ast.Constant) and isinstance(first.value, str) and first.value.startswith("/")):
        return
    named = [one.value for one in call.keywords if one.arg == "methods"]
    methods = {one.value for one in ast.walk(named[0]) if isinstance(one, ast.Constant)} if named else set()
    yield first.value, {str(one) for one in methods} or {verb.upper()}


if __name__ == "__main__":
    sys.exit(main())

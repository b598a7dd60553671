"""scripts/test deals the tests out to two workers: what shares the demo's checkpoint and server is one group."""

import ast
from pathlib import Path

from tests.conftest import SHARE_THE_DEMO, group_of

END_TO_END = Path(__file__).resolve().parents[1] / "e2e"
SHARED = {"demo", "server"}  # fixtures of a whole session, which each worker would make again


def test_all_that_share_the_demo_and_no_others_are_one_group() -> None:
    sharing = {
        path.stem.removeprefix("test_")
        for path in END_TO_END.glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and SHARED & {argument.arg for argument in node.args.args}
    }
    assert sharing == set(SHARE_THE_DEMO)
    assert {group_of(f"tests/e2e/test_{name}.py::test_something[a::b]") for name in sharing} == {"demo"}


def test_other_files_are_groups_of_their_own() -> None:
    assert group_of("tests/e2e/test_families.py::test_a[llama]") == "tests/e2e/test_families.py"
    assert group_of("tests/core/test_core.py::test_a") == "tests/core/test_core.py"

"""Settings that must stand before torch loads, and what runs beside what when scripts/test has two workers."""

import os
from typing import Any

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads sleep: the machine is shared
SHARE_THE_DEMO = (
    "clouds",
    "endpoint",
    "evaluate",
    "features",
    "main_job",
    "messages",
    "page",
    "pod",
    "production",
)  # its checkpoint, and the server of it


def group_of(nodeid: str) -> str:
    """Whose tests one worker takes together: a file's, or those of all files that share the demo and its server."""
    path = nodeid.partition("::")[0]
    return "demo" if path in {f"tests/e2e/test_{name}.py" for name in SHARE_THE_DEMO} else path


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Deal out groups in the order of the tests; xdist's own `loadgroup` does nothing under pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no type information
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    config.option.loadscopereorder = False
    return Groups(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start the real engine go first: they are the longest, and each start is mostly one thread."""
    items.sort(key=lambda item: item.get_closest_marker("engine") is None)

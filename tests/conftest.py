"""Settings that must stand before torch loads, and what runs beside what when scripts/test has two workers."""

import os

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads sleep: the machine is shared


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A worker takes the tests of one file together, or of all files that share the demo's checkpoint and server.

    Those that start the real engine go first: they are the longest, and each start is mostly one thread.
    """
    share_demo = {item.path for item in items if "demo" in getattr(item, "fixturenames", ())}
    for item in items:
        item.add_marker(pytest.mark.xdist_group("demo" if item.path in share_demo else item.path.name))
    items.sort(key=lambda item: (item.path not in share_demo, item.get_closest_marker("engine") is None))

"""Settings that must stand before torch loads, and what runs beside what when scripts/test has two workers."""

import os

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads sleep: the machine is shared


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One worker takes the tests that start the real engine, the other takes the rest, file by file, beside it.

    An engine's start is mostly one thread, and two engines at once would need the memory of both.
    """
    engine = {item: item.get_closest_marker("engine") is not None for item in items}
    for item in items:
        item.add_marker(pytest.mark.xdist_group("engine" if engine[item] else item.path.name))
    items.sort(key=lambda item: not engine[item])  # the longest first

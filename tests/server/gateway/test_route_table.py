"""The one table of routes, and what reads it."""

from pathlib import Path

from lowbit_server.gateway.route_table import CLOSED, ROUTES, UNLISTED, in_markdown, is_allowed, is_decided

DOCS = Path(__file__).parents[3] / "docs" / "server.md"


def test_the_documentation_shows_the_table() -> None:
    assert in_markdown() in DOCS.read_text()


def test_routes_with_a_parameter_are_as_those_that_no_table_names() -> None:
    """The gateway looks paths up as they were asked for."""
    for route in ROUTES:
        if "{" in route.path:
            assert (route.access, route.cost) == (UNLISTED.access, UNLISTED.cost)


def test_no_path_stands_twice_and_work_is_posted() -> None:
    paths = [route.path for route in ROUTES]
    assert len(set(paths)) == len(paths)
    assert all(route.methods == ("POST",) and route.prompt for route in ROUTES if route.cost != "nothing")
    assert all(route.prompt for route in ROUTES if route.batch)


def test_a_new_method_of_an_open_path_is_closed_and_undecided() -> None:
    assert is_allowed("/v1/responses/{response_id}", frozenset({"GET", "HEAD"}))
    assert not is_allowed("/v1/responses/{response_id}", frozenset({"GET", "DELETE"}))
    assert not is_decided("/v1/responses/{response_id}", "DELETE")
    assert not is_decided("/v1/something/new", "POST")


def test_a_route_is_answered_or_closed_and_not_both() -> None:
    vllms = {route.path for route in ROUTES if not route.ours}
    assert vllms & CLOSED.keys() == set()

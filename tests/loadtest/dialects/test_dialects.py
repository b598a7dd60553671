"""Every dialect of `table.py` against the client: nothing is miscounted, and tokens are the server's."""

import pytest
from tests.loadtest.dialects.odd_server import asked, play
from tests.loadtest.dialects.table import OWN, SHARED
from tests.loadtest.dialects.wire import Dialect

from lowbit_core.access import Access, body_change
from lowbit_loadtest.generate.client import Client
from lowbit_loadtest.generate.http.target import Target, open_http
from lowbit_loadtest.generate.records import Outcome, RequestRecord
from lowbit_loadtest.generate.request import Request

HELLO = Request(({"role": "user", "content": "Hello"},), max_tokens=128, temperature=0.0, seed=0)
ALL = (*SHARED, *OWN)


def records_of(dialects: tuple[Dialect, ...], times: int = 2) -> list[list[RequestRecord]]:
    """Each dialect's records; one client asks it several times, as a run does."""
    server = play(dialects)

    async def ask() -> list[list[RequestRecord]]:
        found = []
        for number, one in enumerate(dialects):
            access = Access(body=tuple(map(body_change, one.body)))
            url = f"{server.url}/{number}"
            target = Target(url, "m", None, 5.0, access, endpoint=one.endpoint, lenient=one.lenient)
            async with open_http(target) as http:
                client = Client(http, target)
                found.append([await client.complete(HELLO) for _ in range(times)])
        return found

    return asked(server, ask)


@pytest.fixture(scope="module")
def played() -> dict[str, list[RequestRecord]]:
    return {one.name: records for one, records in zip(ALL, records_of(ALL), strict=True)}


def test_there_are_forty_dialects_of_our_own_and_no_name_twice() -> None:
    assert len(OWN) >= 40
    assert len({one.name for one in ALL}) == len(ALL)


@pytest.mark.parametrize("dialect", ALL, ids=lambda one: one.name)
def test_a_dialect_is_counted_as_what_it_is(dialect: Dialect, played: dict[str, list[RequestRecord]]) -> None:
    for record in played[dialect.name]:
        assert (record.outcome, record.detail[: len(dialect.detail)]) == (dialect.outcome, dialect.detail)
        assert (record.prompt_tokens, record.output_tokens) == dialect.tokens
        assert record.sent_tokens == dialect.sent
        assert len(record.chunk_times_s) == dialect.chunks
        assert record.notes == dialect.notes
        assert record.contradiction is None
        if dialect.answer_at is not None:
            assert record.first_answer_s == record.chunk_times_s[dialect.answer_at]
        else:
            assert record.first_answer_s is None


def test_tokens_of_all_dialects_together_are_the_servers(played: dict[str, list[RequestRecord]]) -> None:
    ours = sum(record.output_tokens or 0 for records in played.values() for record in records)
    assert ours == 2 * sum(one.tokens[1] or 0 for one in ALL)
    completed = [one for one in ALL if one.outcome is Outcome.COMPLETED]
    assert sum(
        record.outcome is Outcome.COMPLETED for records in played.values() for record in records
    ) == 2 * len(completed)


def test_time_per_output_token_is_of_the_tokens_that_were_sent(
    played: dict[str, list[RequestRecord]],
) -> None:
    for record in played["hiddenreasoning"]:
        assert record.finished_s is not None
        expected = (record.finished_s - record.chunk_times_s[0]) / 4
        assert record.time_per_output_token_s == pytest.approx(expected)
        assert record.reasoning_tokens == 100

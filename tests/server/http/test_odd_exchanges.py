"""500 malformed or odd HTTP exchanges over raw sockets, against the whole gateway before an engine that is not vLLM.

None gets a 5xx, none keeps its connection past the bounds, none leaves a request behind, and after each the server
answers the next good request.
"""

import asyncio

from tests.server.http.odd_exchanges import exchanges
from tests.server.http.served import BOUND_S, STATUS, Served

NUMBER, AT_ONCE = 500, 20


async def test_odd_exchanges_get_no_5xx_and_leave_nothing_behind(served: Served) -> None:
    everything = exchanges(NUMBER, seed=1)
    statuses: dict[bytes, int] = {}
    for begin in range(0, NUMBER, AT_ONCE):
        batch = everything[begin : begin + AT_ONCE]
        found = await asyncio.gather(*(served.answers(one) for one in batch))
        for exchange, answer in zip(batch, found, strict=True):
            seen = STATUS.findall(answer)
            assert not [status for status in seen if status >= b"500"], (exchange, answer)
            assert answer == b"" or seen, (exchange, answer)
            for status in seen:
                statuses[status] = statuses.get(status, 0) + 1
        assert await served.answers_a_good_request()
    assert {b"100", b"200", b"400", b"404", b"405", b"413", b"415", b"431"} <= statuses.keys()
    await asyncio.sleep(BOUND_S / 2)
    assert served.tracker.active == 0
    state = served.serving.server.server_state
    assert (state.connections, state.tasks) == (set(), set())

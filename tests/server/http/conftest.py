"""The server that tests of raw sockets share."""

from collections.abc import AsyncIterator

import pytest
from tests.server.http.served import Served, serving_the_gateway


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving_the_gateway() as server:
        yield server

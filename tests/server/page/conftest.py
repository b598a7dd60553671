"""One browser for a file of tests, and the page behind a stand-in engine."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from tests.browser import Watched, chromium, watching
from tests.server.page.stand_in import Script, serving_the_page

if TYPE_CHECKING:
    from tests.server.conftest import MakeCheckpoint


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def tab(browser: Any, make_checkpoint: "MakeCheckpoint", script: Script) -> Iterator[Watched]:
    """The page, open and ready, whose engine says what `script` says."""
    with serving_the_page(make_checkpoint(), script) as url, watching(browser, url) as tab:
        tab.open()
        yield tab

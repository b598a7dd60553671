"""No sequence of requests, refusals, exceptions, aborts, deadlines, key reloads and clock steps leaves a place or
tokens behind, or lets more through than the limits say.

hypothesis' stateful machine drives the whole stack of middleware over an engine that obeys it, on a clock and an event
loop that pass when it says so. limit_books.py counts beside it, by the documentation and without the code's help.
LOWBIT_LIMIT_SEQUENCES=2000 runs as many sequences; the default is for every day.
"""

import json
import logging
import os
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tests.server.gateway.key_files import key_file
from tests.server.gateway.limit_books import Books
from tests.server.gateway.limit_oracle import BAD_BODIES, CHOICES, LIMITS, NAMES, OUTPUTS, PROMPTS, UNITS
from tests.server.gateway.scripted_engine import Exchange, ScriptedEngine
from tests.server.gateway.stepped_loop import SteppedLoop

from lowbit_server.app import with_cors
from lowbit_server.config import ServeConfig
from lowbit_server.gateway.keys import KeyStore
from lowbit_server.gateway.middleware import Gateway
from lowbit_server.gateway.request_limits import Models, ServerLimits
from lowbit_server.gateway.request_tracker import LATE_S, RequestTracker
from lowbit_server.http.entrance import Entrance

SEQUENCES = int(os.environ.get("LOWBIT_LIMIT_SEQUENCES", "40"))
PLACES, BODY_BYTES, ALL_BODIES = 6, 400, 420


class LimitSequences(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        logging.disable(logging.CRITICAL)
        self.folder = tempfile.TemporaryDirectory()
        self.loop = SteppedLoop()
        self.now, self.draining = 5000.0, False
        self.file = Path(self.folder.name) / "keys"
        self.books = Books(PLACES, LATE_S)
        key_file(self.file, *self.books.in_file())
        self.tracker = RequestTracker(write_log=False)
        self.keys = KeyStore(self.file, lambda: self.now)
        engine = ScriptedEngine(self.tracker.engine_finished, self.books.admitted)
        limits = ServerLimits(PLACES, 4000, BODY_BYTES, None, None, None)
        self.gateway = Gateway(
            engine, limits, self.keys, self.tracker, Models("tiny", {"tiny"}.__contains__),
            is_draining=lambda: self.draining, clock=lambda: self.now,
        )  # fmt: skip
        self.gateway._capacity.body_bytes = ALL_BODIES
        front = Entrance(self.gateway, "", BODY_BYTES)
        self.app = with_cors(front, ServeConfig(Path("unused"), cors_origins=("https://a.example",)))

    # Requests

    @rule(
        name=st.sampled_from(NAMES), output=st.sampled_from(OUTPUTS), choices=st.sampled_from(CHOICES),
        prompt=st.sampled_from(PROMPTS), pieces=st.integers(1, 3), heeds=st.booleans(),
        timeout=st.sampled_from(("", "3", "nan", "-1")), priority=st.booleans(),
    )  # fmt: skip
    def request(
        self, name: str, output: Any, choices: Any, prompt: Any, pieces: int, heeds: bool, timeout: str,
        priority: bool,
    ) -> None:  # fmt: skip
        document = {"model": "tiny", "prompt": prompt[0]}
        if output[0] is not None:
            document["max_tokens"] = output[0]
        if choices[0] is not None:
            document["n"] = choices[0]
        if priority:
            document["priority"] = -9
        text = prompt[0] if isinstance(prompt[0], str) else json.dumps(prompt[0])
        read = len(text) // 4
        facts = {
            "prompts": prompt[1], "read": read, "sequences": prompt[1] * choices[1], "counted": 0, "finished": 0,
            "reserved": read + min(1 << 50, output[1]) * choices[1] * prompt[1], "name": name,
        }  # fmt: skip
        self._start(name, json.dumps(document).encode(), pieces, facts, heeds, timeout)

    @rule(data=st.data(), name=st.sampled_from(NAMES), kind=st.integers(0, 7))
    def refused(self, data: Any, name: str, kind: int) -> None:
        """Most are bodies that are refused; the rest never get so far."""
        if kind == 0:
            self.without_a_key(data.draw(st.sampled_from(("/v1/models", "/v1/completions", "/nowhere"))))
        elif kind == 1:
            self.request_while_draining(name)
        elif kind == 2:
            self.compressed_nonsense(data.draw(st.sampled_from(("gzip", "zstd", "br"))), "/v1/completions")
        else:
            self.bad_request(name, data.draw(st.sampled_from(BAD_BODIES)), kind % 2 + 1)

    def bad_request(self, name: str, body: bytes, pieces: int) -> None:
        self._start(name, body, pieces, {"bad": True, "name": name}, False, "")

    def compressed_nonsense(self, encoding: str, path: str) -> None:
        exchange = Exchange(path, {"authorization": "Bearer c-secret", "content-encoding": encoding})
        self._run(exchange, {"bad": True})
        exchange.body(b"nonsense")
        self.loop.settle()

    def without_a_key(self, path: str) -> None:
        exchange = Exchange(path, {"authorization": "Bearer nobody"})
        self._run(exchange, {"bad": True})
        assert exchange.status == 401

    @rule(
        name=st.sampled_from(NAMES), output=st.sampled_from(OUTPUTS), prompt=st.sampled_from(PROMPTS),
        end=st.sampled_from(("end", "end", "raise", "refuse", "fail", "leave")), used=st.integers(0, 90),
    )  # fmt: skip
    def whole_exchange(self, name: str, output: Any, prompt: Any, end: str, used: int) -> None:
        before = list(self.books.open)
        self.request(name, output, CHOICES[0], prompt, 1, end == "leave", "", False)
        exchange = next((one for one in self.books.open if one not in before and one.admitted), None)
        if exchange is None:
            return
        if used % 2:
            self.obey(exchange, "count", used)
        if end == "leave":
            exchange.disconnect()
            self.loop.settle()
            self._reap()
        else:
            self.obey(exchange, end, used)

    def _start(
        self, name: str, body: bytes, pieces: int, facts: dict[str, Any], heeds: bool, timeout: str
    ) -> None:
        exchange = Exchange("/v1/completions", {"authorization": f"Bearer {name}-secret"})
        if timeout:
            exchange.headers.append((b"x-request-timeout", timeout.encode()))
        exchange.heeds_disconnect = heeds
        cuts = [len(body) * i // pieces for i in range(pieces + 1)]
        facts["parts"] = [body[start:end] for start, end in pairwise(cuts)]
        facts["delivered"] = 0
        self._run(exchange, facts)
        if pieces == 1:
            self._deliver(exchange)

    def _run(self, exchange: Exchange, facts: dict[str, Any]) -> None:
        self.books.facts[exchange] = facts
        self.books.open.append(exchange)
        scope, receive, send = exchange.scope, exchange.receive, exchange.send
        exchange.task = self.loop.start(self.app(scope, receive, send))
        if "name" in facts and not exchange.done:
            self.books.entered(facts)
        self._reap()

    def _deliver(self, exchange: Exchange) -> None:
        facts = self.books.facts[exchange]
        part = facts["parts"].pop(0)
        facts["delivered"] += len(part)
        exchange.body(part, more=bool(facts["parts"]))
        self.loop.settle()
        self._reap()

    def _pick(self, data: Any, admitted: bool | None = None) -> Exchange | None:
        some = [one for one in self.books.open if admitted is None or one.admitted == admitted]
        return data.draw(st.sampled_from(some)) if some else None

    @precondition(lambda self: self.books.open)
    @rule(data=st.data())
    def more_of_a_body(self, data: Any) -> None:
        exchange = self._pick(data, admitted=False)
        if exchange is not None and self.books.facts[exchange].get("parts"):
            self._deliver(exchange)

    # How they go on

    @precondition(lambda self: self.books.open)
    @rule(
        data=st.data(),
        order=st.sampled_from(("chunk", "chunk", "count", "end", "end", "raise", "refuse", "busy", "answer", "fail")),
        used=st.integers(0, 90),
    )  # fmt: skip
    def engine(self, data: Any, order: str, used: int) -> None:
        exchange = self._pick(data, admitted=True)
        if exchange is not None:
            self.obey(exchange, order, used)

    def obey(self, exchange: Exchange, order: str, used: int) -> None:
        """Let the engine do something with a request that it has."""
        facts = self.books.facts[exchange]
        if order == "count":
            facts["counted"] += used + 1
            facts["finished"] += 1
            exchange.order("count", (facts["finished"], 1, used))
        elif order in ("refuse", "busy", "answer", "fail"):
            status = {"refuse": 400, "busy": 429, "answer": 200, "fail": 500}[order]
            exchange.order("answer", status)
        else:
            exchange.order(order)
        self.loop.settle()
        self._reap()

    @precondition(lambda self: self.books.open)
    @rule(data=st.data())
    def client_leaves(self, data: Any) -> None:
        exchange = self._pick(data)
        assert exchange is not None
        exchange.disconnect()
        exchange.heeds_disconnect = True
        self.loop.settle()
        self._reap()

    @precondition(lambda self: self.books.open)
    @rule(data=st.data())
    def server_cancels(self, data: Any) -> None:
        exchange = self._pick(data)
        assert exchange is not None
        assert exchange.task is not None
        exchange.task.cancel()
        self.loop.settle()
        self._reap()

    # Time, keys and operators

    @rule(seconds=st.sampled_from((0.5, 2.5, 11.0, 31.0, 61.0)))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.books.flow(seconds)
        self.loop.advance(seconds)
        self._reap()

    @rule(seconds=st.sampled_from((-5000.0, -30.0, 600.0)))
    def clock_steps(self, seconds: float) -> None:
        """A bucket that nobody looks at between two steps sees their sum: so each is looked at."""
        self.now += seconds
        self.books.flow(max(0.0, seconds))
        for usage in self.gateway._usages._by_name.values():
            usage.headers()

    def request_while_draining(self, name: str) -> None:
        self.draining = True
        self._start(name, b"[]", 1, {"bad": True, "name": name}, False, "")
        self.draining = False

    @rule(name=st.sampled_from(NAMES), limits=st.sampled_from(LIMITS), kind=st.integers(0, 5))
    def key_file_changes(self, name: str, limits: dict[str, int], kind: int) -> None:
        if kind == 0:
            self.key_file_is_broken_for_a_while()
        elif kind == 1 and len(self.books.entries) > 1:
            self.key_goes(name)
        elif kind == 2:
            self.key_is_renamed(name)
        elif kind == 3:
            self.limits_change(name, limits)
        else:
            self.key_comes_back(name, limits)

    def limits_change(self, name: str, limits: dict[str, int]) -> None:
        if name in self.books.entries:
            self.books.entries[name] = limits
            self._reload()

    def key_goes(self, name: str) -> None:
        if name in self.books.entries:
            del self.books.entries[name]
            self._reload()

    def key_comes_back(self, name: str, limits: dict[str, int]) -> None:
        books = self.books
        if name not in books.entries and name not in {books.secrets[one] for one in books.entries}:
            books.entries[name], books.secrets[name] = limits, name
            self._reload()

    def key_is_renamed(self, name: str) -> None:
        if name in self.books.entries and f"{name}-new" not in self.books.entries:
            self.books.rename(name)
            self._reload()

    def key_file_is_broken_for_a_while(self) -> None:
        self.file.write_text("keys: [")
        self._look_again()
        self._reload()

    def _reload(self) -> None:
        key_file(self.file, *self.books.in_file())
        self.books.hand_over()
        self._look_again()
        self.books.take_limits()

    def _look_again(self) -> None:
        self.now += 3
        self.books.flow(3)
        os.utime(self.file, ns=(int(self.now * 1e9), id(object()) % 1000 + int(self.now * 1e9)))
        self.keys.find("nobody")

    def _reap(self) -> None:
        self.books.reap(self.loop.now_s)

    # What the books say

    @invariant()
    def every_bucket_is_as_full_as_the_documentation_says(self) -> None:
        for name, account in self.books.accounts.items():
            usage = self.gateway._usages._by_name.get(name)
            if usage is None:
                continue
            assert usage.active == account.places
            for unit, bucket in zip(UNITS, (usage.requests, usage.tokens), strict=True):
                assert (bucket is None) == (unit not in account.levels)
                assert bucket is None or abs(bucket.level() - account.levels[unit]) < 1e-3, (name, unit)

    @invariant()
    def no_more_is_held_than_runs(self) -> None:
        capacity = self.gateway._capacity
        held = sum(self.books.facts[one].get("delivered", 0) for one in self.books.open)
        assert 0 <= capacity.places_taken <= PLACES
        assert capacity.bytes_taken <= min(held + 100, ALL_BODIES)
        if not self.books.open:
            assert (capacity.places_taken, capacity.bytes_taken, self.tracker.active) == (0, 0, 0)

    def teardown(self) -> None:
        try:
            self._end_everything()
            self._nothing_is_left()
        finally:
            self.loop.close()
            self.folder.cleanup()
            logging.disable(logging.NOTSET)

    def _end_everything(self) -> None:
        for exchange in list(self.books.open):
            exchange.disconnect()
            exchange.order("end")
        self.loop.settle()
        self.time_passes(100.0)
        for exchange in list(self.books.open):
            assert exchange.done, (exchange.path, exchange.status)

    def _nothing_is_left(self) -> None:
        usages = self.gateway._usages._by_name.values()
        capacity = self.gateway._capacity
        assert (capacity.places_taken, capacity.bytes_taken, self.tracker.active) == (0, 0, 0)
        assert self.tracker._open == {}
        assert [usage.active for usage in usages] == [0] * len(usages)
        self.now += 1e9
        assert all(usage.idle for usage in usages)


TestLimitSequences = LimitSequences.TestCase
TestLimitSequences.settings = settings(
    max_examples=SEQUENCES,
    stateful_step_count=40,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)

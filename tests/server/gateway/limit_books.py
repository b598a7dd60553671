"""What the keys and requests of test_limit_sequences.py hold by the documentation, counted without the code's help."""

from collections.abc import Iterator
from typing import Any

from tests.server.gateway.limit_oracle import LIMITS, NAMES, Account
from tests.server.gateway.scripted_engine import Broken, Exchange

REFUSALS = (400, 401, 403, 404, 408, 413, 415, 429, 503)


class Books:
    """`open`: requests that have not ended; `facts`: what is known of each. `places` are the whole server's."""

    def __init__(self, places: int, late_s: float) -> None:
        self.places, self.late_s = places, late_s
        self.entries: dict[str, dict[str, Any]] = {"a": LIMITS[6], "b": LIMITS[4], "c": LIMITS[3]}
        self.secrets = {name: name for name in NAMES}  # name -> whose secret it has
        self.accounts = {name: Account() for name in NAMES}
        self.gone: dict[str, Account] = {}  # by secret
        self.open: list[Exchange] = []
        self.facts: dict[Exchange, dict[str, Any]] = {}
        self.late: list[tuple[float, Account, dict[str, Any]]] = []
        self.take_limits()

    # The key file

    def in_file(self) -> Iterator[dict[str, Any]]:
        """The file's entries."""
        return (
            {"name": name, "secret": self.secrets[name], **limits} for name, limits in self.entries.items()
        )

    def rename(self, name: str) -> None:
        """Under its new name it has its old secret."""
        self.entries[f"{name}-new"] = self.entries.pop(name)
        self.secrets[f"{name}-new"] = self.secrets[name]

    def hand_over(self) -> None:
        """The file has been written: a key keeps its account under its name, or else under its secret."""
        before = dict(self.accounts)
        after = {name: before[name] for name in self.entries if name in before}
        left = {self.secrets[name]: account for name, account in before.items() if name not in self.entries}
        left |= self.gone
        for name in self.entries:
            if name not in after:
                secret = self.secrets[name]
                after[name] = left.pop(secret) if secret in left else Account()
        self.accounts, self.gone = after, left

    def take_limits(self) -> None:
        """The server has read the file."""
        for name, account in self.accounts.items():
            account.change(self.entries[name])

    # Time

    def flow(self, seconds: float) -> None:
        running = [facts["account"] for facts in self.facts.values() if "account" in facts]
        everyone = (*self.accounts.values(), *self.gone.values(), *running)
        for account in {id(one): one for one in everyone}.values():
            account.flow(seconds)

    # Requests

    def entered(self, facts: dict[str, Any]) -> None:
        """A request's body is awaited: it has a place, and is one request."""
        account = facts["account"] = self._account_of(facts["name"])
        account.places += 1
        facts["held"] = 1
        assert account.places <= account.limits.get("concurrent_requests", 1 << 30)
        facts["requests"] = [account.take("requests_per_minute", 1)]

    def _account_of(self, name: str) -> Account:
        return next(self.accounts[one] for one in self.entries if self.secrets[one] == name)

    def admitted(self, exchange: Exchange) -> None:
        """The engine has it."""
        facts = self.facts[exchange]
        assert "bad" not in facts
        account: Account = facts["account"]
        more = facts["prompts"] - 1
        account.places += more
        facts["held"] += more
        assert account.places <= account.limits.get("concurrent_requests", 1 << 30) or not more
        if more:
            facts["requests"].append(account.take("requests_per_minute", more))
        facts["tokens"] = account.take("tokens_per_minute", facts["reserved"])
        in_engine = sum(self.facts[one]["prompts"] for one in self.open if one.admitted)
        assert in_engine <= self.places

    def reap(self, now_s: float) -> None:
        """Requests that have ended, however, and counts that came too late."""
        for exchange in [one for one in self.open if one.done]:
            self.open.remove(exchange)
            assert exchange.task is not None
            if not exchange.task.cancelled() and (error := exchange.task.exception()) is not None:
                assert isinstance(error, Broken)
            self._ended(exchange, self.facts[exchange], now_s)
        due = [one for one in self.late if one[0] <= now_s]
        self.late = [one for one in self.late if one not in due]
        for _, account, facts in due:
            account.use(facts["read"], facts["tokens"])

    def _ended(self, exchange: Exchange, facts: dict[str, Any], now_s: float) -> None:
        account: Account | None = facts.get("account")
        if account is not None:
            account.places -= facts["held"]
        refused = 400 <= exchange.status < 500 or not exchange.admitted
        if refused and account is not None and not facts.get("counted"):
            for receipt in facts["requests"]:
                account.use(0, receipt)
        if not exchange.admitted:
            assert exchange.task is not None
            assert exchange.task.cancelled() or exchange.status in REFUSALS, exchange.sent
        elif account is not None:
            if facts["counted"] or refused or exchange.status >= 500:
                account.use(facts["counted"], facts["tokens"])
            else:
                self.late.append((now_s + self.late_s, account, facts))

"""Named API keys from a file that holds only their hashes, read again when it changes.

    keys:
      - name: team-a                  # in metrics and logs; the key itself is in neither
        sha256: 5e88…                 # `lowbit key team-a` makes a key and prints this entry
        requests_per_minute: 600
        tokens_per_minute: 200000     # prompt and generated
        tokens_per_month: 50000000    # the same, by the calendar in UTC; needs --usage-file
        concurrent_requests: 16
        models: [SmolLM2-135M-Instruct]   # all, when left out
        priority: 0                   # lower is served first
        admin: false                  # may read /metrics and /lowbit/checkpoint

Keys are 256 random bits, so a plain SHA-256 of one gives nothing to guess.
"""

import hashlib
import hmac
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lowbit_core.documents import describe_error
from lowbit_core.errors import ConfigError
from lowbit_core.log import get_logger
from lowbit_core.strict_yaml import strict_load
from lowbit_server.file_stamp import file_stamp

log = get_logger("serve")

PREFIX = "lb-"
RELOAD_S = 2.0  # the file is looked at no more often than this


class Key(BaseModel):
    """What one key may do; None means no limit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_month: int | None = Field(default=None, ge=1)
    concurrent_requests: int | None = Field(default=None, ge=1)
    models: tuple[str, ...] | None = None
    priority: int = 0
    admin: bool = False


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    keys: tuple[Key, ...] = Field(min_length=1)


ANONYMOUS = Key(name="anonymous", sha256="0" * 64, admin=True)  # everyone, where no keys are configured
OTHER = "other"  # keys beyond those that metrics show one by one
RESERVED = (ANONYMOUS.name, OTHER)


def digest(key: str) -> str:
    """What the file holds for a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def new_key() -> str:
    """A fresh key: 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


class KeyStore:
    """The keys of a file by their hash. A changed file is read again; if it is wrong, the old keys stay in force.

    `counts_months`: whether there is a usage file, without which a key may have no quota of a month.
    """

    def __init__(
        self, path: Path, clock: Callable[[], float] = time.monotonic, *, counts_months: bool = False
    ) -> None:
        self._path, self._clock, self._counts_months = path, clock, counts_months
        self._stamp, self._looked_at = file_stamp(path), clock()
        self._take(self._read())
        self.on_change: Callable[[Iterable[Key]], None] = lambda _keys: None

    def find(self, presented: str) -> Key | None:
        """The key that a client presented; None where the file does not have it."""
        self._reload_if_changed()
        hashed = digest(presented)
        key = self._keys.get(hashed)
        return key if key is not None and hmac.compare_digest(key.sha256, hashed) else None

    @property
    def with_quota(self) -> list[Key]:
        """The keys whose tokens of a month are limited."""
        return [key for key in self._keys.values() if key.tokens_per_month is not None]

    def _read(self) -> dict[str, Key]:
        keys = read_keys(self._path)
        limited = next((key for key in keys.values() if key.tokens_per_month is not None), None)
        if limited is not None and not self._counts_months:
            raise ConfigError(
                f"API key file {self._path}: {limited.name} has tokens_per_month, which is counted in a file; "
                "give `lowbit serve` --usage-file too, or leave it out"
            )
        return keys

    def _take(self, keys: dict[str, Key]) -> None:
        self._keys = keys
        self.uses_priorities = any(
            key.priority for key in keys.values()
        )  # whether any is served before another

    def _reload_if_changed(self) -> None:
        now = self._clock()
        if 0 <= now - self._looked_at < RELOAD_S:
            return
        self._looked_at = now
        stamp = file_stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._take(self._read())
        except ConfigError as error:
            log.error("API keys: %s; the keys read before stay in force", error)
        else:
            log.info("API keys: read %d again from %s", len(self._keys), self._path)
            self.on_change(self._keys.values())


def read_keys(path: Path) -> dict[str, Key]:
    """The keys of a file by their hash; raises ConfigError naming what is wrong."""
    try:
        data: Any = strict_load(path.read_text(encoding="utf-8"))
        keys = _File.model_validate(data).keys
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"API key file {path} cannot be read: {error}") from None
    except ValidationError as error:
        wrong = describe_error(error, _File)
        raise ConfigError(f"API key file {path}: {wrong}; `lowbit key NAME` prints an entry") from None
    for field in ("name", "sha256"):
        counts = Counter(getattr(key, field) for key in keys)
        if twice := next((value for value, count in counts.items() if count > 1), None):
            raise ConfigError(f"API key file {path}: the {field} {twice} stands twice")
    for key in keys:
        refuse_reserved(key.name)
    return {key.sha256: key for key in keys}


def refuse_reserved(name: str) -> None:
    """Raise ConfigError for a name under which metrics and logs count something else."""
    if name in RESERVED:
        raise ConfigError(
            f"the key name {name} is taken: metrics use {' and '.join(RESERVED)}; choose another"
        )

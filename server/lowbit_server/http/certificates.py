"""The certificate that is served over TLS: checked before anything is loaded, and read again when its files change.

A handshake takes whatever is in force at that moment; connections that stand keep theirs. A pair that does not fit, as
in the moment between two files being written, leaves the one before in force.
"""

import asyncio
import ssl
from pathlib import Path
from typing import Any

from lowbit_core.errors import ConfigError
from lowbit_core.log import get_logger
from lowbit_server.file_stamp import file_stamp

RELOAD_S = 2.0

log = get_logger("serve")


def open_certificate(certificate: Path, key: Path) -> ssl.SSLContext:
    """A TLS context of this pair; raises ConfigError that says which file is wrong, and how."""
    for flag, path in (("--ssl-certfile", certificate), ("--ssl-keyfile", key)):
        try:
            path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{flag} {path} cannot be read: {error.strerror}") from None

    def no_password() -> str:
        raise ConfigError(f"--ssl-keyfile {key} is encrypted; give a key without a password")

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key, no_password)
    except ssl.SSLError as error:
        why = (
            "do not belong together"
            if error.reason == "KEY_VALUES_MISMATCH"
            else "are not a PEM certificate and its key"
        )
        raise ConfigError(
            f"--ssl-certfile {certificate} and --ssl-keyfile {key} {why} ({error.reason or error})"
        ) from None
    return context


class Certificates:
    """The pair in force, which `watch` renews. `context` is what the HTTP server is given."""

    def __init__(self, certificate: Path, key: Path) -> None:
        self._files = certificate, key
        self._stamp = self._stamps()
        self._current = open_certificate(certificate, key)
        self.context = open_certificate(certificate, key)
        self.context.sni_callback = self._choose

    def _choose(self, connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        connection.context = self._current

    async def watch(self, every_s: float = RELOAD_S) -> None:
        """Read the pair again whenever a file changes, until cancelled."""
        while True:
            await asyncio.sleep(every_s)
            stamp = self._stamps()
            if stamp != self._stamp:
                self._stamp = stamp
                self._reload()

    def _reload(self) -> None:
        try:
            self._current = open_certificate(*self._files)
        except ConfigError as error:
            log.error("TLS: %s; the certificate read before stays in force", error)
        else:
            log.info("TLS: the certificate was read again from %s", self._files[0])

    def _stamps(self) -> tuple[Any, ...]:
        return tuple(file_stamp(path) for path in self._files)

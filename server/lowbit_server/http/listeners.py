"""Sockets to listen on, TCP or Unix, bound before the engine starts: what is taken or not allowed is said at once."""

import contextlib
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from lowbit_core.errors import ConfigError
from lowbit_server.config import ServeConfig, address

BACKLOG = 2048  # connections that wait for accept(), as uvicorn's default


def listener_of(config: ServeConfig) -> AbstractContextManager[socket.socket]:
    """The socket that clients reach."""
    return bind(config.host, config.port) if config.uds is None else bind_unix(config.uds)


@contextlib.contextmanager
def bind(host: str, port: int) -> Iterator[socket.socket]:
    """A TCP socket on this address; raises ConfigError when it is taken or not allowed. `listen` comes later."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise _refused(address(host, port), error) from error
        yield listener


@contextlib.contextmanager
def bind_unix(path: Path) -> Iterator[socket.socket]:
    """A Unix socket at this path, whose file is removed at the end; who may connect, the process's umask says.

    The file that a server left which was killed is replaced. Raises ConfigError where a server answers or another
    kind of file is.
    """
    _remove_stale(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        try:
            listener.bind(str(path))
        except OSError as error:
            raise _refused(f"unix:{path}", error) from error
        try:
            yield listener
        finally:
            path.unlink(missing_ok=True)


def _remove_stale(path: Path) -> None:
    try:
        is_socket = stat.S_ISSOCK(path.lstat().st_mode)
    except OSError:
        return  # none there, or `bind` says what is wrong with the path
    if not is_socket:
        raise ConfigError(f"--uds {path} is there and no socket; choose another path or remove it")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
        except OSError as error:
            raise _refused(f"unix:{path}", error) from error
        else:
            raise ConfigError(f"cannot listen on unix:{path}: a server answers there; choose another --uds")


def listen(listener: socket.socket) -> None:
    """Open the port; raises ConfigError when another program opened it since it was bound."""
    try:
        listener.listen(BACKLOG)
    except OSError as error:
        raise _refused(name_of(listener), error) from error


def name_of(listener: socket.socket) -> str:
    """A bound socket's address as it stands in messages."""
    if listener.family == socket.AF_UNIX:
        return f"unix:{os.fsdecode(listener.getsockname())}"
    host, port = listener.getsockname()[:2]
    return address(host, port)


def _refused(where: str, error: OSError) -> ConfigError:
    choose = "--uds" if where.startswith("unix:") else "--port"
    return ConfigError(f"cannot listen on {where}: {error.strerror or error}; choose another {choose}")

"""The base endpoint's API key, in a file of its own: a flag would show it to everybody on the machine."""

from pathlib import Path

from lowbit_core.errors import ConfigError


def read_key(path: Path) -> str:
    """The API key in a file; ConfigError where it cannot be read or does not hold one line."""
    try:
        lines = path.read_text(encoding="ascii").split()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--shadow-key-file {path} cannot be read: {error}") from None
    if len(lines) != 1:
        raise ConfigError(f"--shadow-key-file {path} holds {len(lines)} words; put the API key alone into it")
    return lines[0]

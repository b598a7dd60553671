"""The file of API keys, and the buckets that hold their limits."""

from pathlib import Path

import pytest
from tests.server.gateway.key_files import key_file

from lowbit_core.cli import main
from lowbit_core.errors import ConfigError
from lowbit_server.gateway.key_limits import Bucket
from lowbit_server.gateway.keys import KeyStore, read_keys


def test_changed_keys_are_read_again_and_broken_ones_are_not(tmp_path: Path) -> None:
    now = [0.0]
    path = key_file(tmp_path / "k", {"name": "old"})
    store = KeyStore(path, lambda: now[0])
    path.write_text("keys: [")
    now[0] = 10
    assert store.find("old-secret") is not None
    key_file(path, {"name": "brand-new"})
    assert store.find("brand-new-secret") is None  # not looked at again yet
    now[0] = 20
    assert store.find("brand-new-secret") is not None
    assert store.find("old-secret") is None


def test_a_key_file_that_goes_or_becomes_no_file_changes_nothing_until_a_sound_one_is_there(
    tmp_path: Path,
) -> None:
    """As secrets are mounted: a link to a folder that is replaced, with moments in which nothing is there."""
    now = [0.0]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        key_file(tmp_path / name / "keys", {"name": name})
    link, path = tmp_path / "data", tmp_path / "keys"
    link.symlink_to("one")
    path.symlink_to("data/keys")
    store = KeyStore(path, lambda: now[0])

    def names() -> list[str]:
        now[0] += 10
        return [name for name in ("one", "two") if store.find(f"{name}-secret") is not None]

    link.unlink()
    assert names() == ["one"]
    link.symlink_to("nowhere")
    assert names() == ["one"]
    path.unlink()
    path.mkdir()
    assert names() == ["one"]
    path.rmdir()
    for broken in (b"", b"\x00\xff", b"keys:\n\t- x", b"keys: &a [*a]"):
        path.write_bytes(broken)
        assert names() == ["one"]
    link.unlink()
    link.symlink_to("two")
    path.unlink()
    path.symlink_to("data/keys")
    assert names() == ["two"]
    key_file(tmp_path / "new", {"name": "one"})
    (tmp_path / "new").replace(path)
    assert names() == ["one"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("keys: []", "keys = []: allowed is 1 or more of them"),
        ("keys: [{name: a}]", "keys.0.sha256 is missing"),
        ("keys: [{name: a, sha256: plain}]", "keys.0.sha256 = 'plain': allowed is text that matches"),
        (f"keys: [{{name: a, sha256: '{'0' * 64}', rpm: 3}}]", "unknown key 'keys.0.rpm'"),
        (
            f"keys: [{{name: a, sha256: '{'0' * 64}'}}, {{name: a, sha256: '{'1' * 64}'}}]",
            "name a stands twice",
        ),
        ("keys: []\nkeys: []", "the key 'keys' stands twice"),
        ("[", "cannot be read"),
    ],
)
def test_a_wrong_key_file_is_refused_with_its_place(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "k").write_text(text)
    with pytest.raises(ConfigError, match="API key file") as raised:
        read_keys(tmp_path / "k")
    assert words in str(raised.value)


def test_a_made_key_opens_with_its_entry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["key", "team-a"]) == 0
    printed = capsys.readouterr().out
    key = printed.splitlines()[0].removeprefix("# ")
    (tmp_path / "k").write_text(printed)
    found = KeyStore(tmp_path / "k").find(key)
    assert found is not None
    assert found.name == "team-a"
    assert len(key) > 40
    assert main(["key", "two words"]) == 2


def test_a_bucket_fills_steadily_and_never_over() -> None:
    now = [0.0]
    bucket = Bucket(60, lambda: now[0])
    bucket.take(60)
    assert bucket.wait_s(1) == pytest.approx(1)
    now[0] = 10
    assert bucket.level() == pytest.approx(10)
    bucket.take(30)
    assert bucket.wait_s(1) == pytest.approx(21)
    now[0] = 1000
    assert bucket.level() == 60
    assert bucket.wait_s(61) == pytest.approx(1)
    bucket.take(-100)
    assert bucket.level() == 60

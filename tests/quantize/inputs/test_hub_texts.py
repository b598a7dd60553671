"""Data sets of the hub: which configuration and split are meant, and what an error says. The package is a fake."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from lowbit_core.errors import RecipeError
from lowbit_quantize.quality.hub import read_hub


class FakeDatasets:
    """The four functions of the package datasets that are called; notes what is loaded."""

    def __init__(self, splits: Mapping[str, list[str]], default: str | None = None, rows: Any = None) -> None:
        self.splits, self.default = splits, default
        self.rows = rows if rows is not None else [{"text": "a"}, {"text": "b"}]
        self.loaded: tuple[Any, ...] = ()

    def get_dataset_config_names(self, name: str, revision: str | None) -> list[str]:
        return list(self.splits)

    def get_dataset_default_config_name(self, name: str, revision: str | None) -> str | None:
        return self.default

    def get_dataset_split_names(self, name: str, config: str, revision: str | None) -> list[str]:
        return self.splits[config]

    def load_dataset(
        self, name: str, config: str, split: str, revision: str | None, streaming: bool
    ) -> Iterator[Any]:
        assert streaming
        self.loaded = (name, config, split, revision)
        return iter(self.rows)


CHAT = {"default": ["train_sft", "test_sft"]}
TWO = {"en": ["train", "test"], "de": ["train"]}


@pytest.mark.parametrize(
    ("source", "splits", "default", "loaded"),
    [
        ("hub:a/b", {"default": ["train", "test"]}, None, ("a/b", "default", "train", None)),
        ("hub:a/b@v1", {"default": ["train"]}, None, ("a/b", "default", "train", "v1")),
        ("hub:a/b", {"default": ["validation"]}, None, ("a/b", "default", "validation", None)),
        ("hub:a/b:train_sft", CHAT, None, ("a/b", "default", "train_sft", None)),
        ("hub:a/b:default:test_sft@v1", CHAT, None, ("a/b", "default", "test_sft", "v1")),
        ("hub:a/b::test_sft", CHAT, None, ("a/b", "default", "test_sft", None)),
        ("hub:a/b:de", TWO, None, ("a/b", "de", "train", None)),
        ("hub:a/b:en:test", TWO, None, ("a/b", "en", "test", None)),
        ("hub:a/b", TWO, "en", ("a/b", "en", "train", None)),
        ("hub:a/b:test", TWO, "en", ("a/b", "en", "test", None)),
    ],
)
def test_configuration_and_split_are_found(
    source: str, splits: dict[str, list[str]], default: str | None, loaded: tuple[Any, ...]
) -> None:
    datasets = FakeDatasets(splits, default)
    assert [one.text for one in read_hub(source, 1000, datasets)] == ["a", "b"]
    assert datasets.loaded == loaded


@pytest.mark.parametrize(
    ("source", "splits", "words"),
    [
        ("hub:a/b", CHAT, "hub:a/b has the splits train_sft, test_sft; write hub:a/b:train_sft"),
        ("hub:a/b:tran_sft", CHAT, "has no split 'tran_sft'; did you mean train_sft? it has train_sft, test_sft"),
        ("hub:a/b", TWO, "hub:a/b has the configurations en, de; write hub:a/b:en"),
        ("hub:a/b:fr", TWO, "hub:a/b has no configuration 'fr'; it has en, de"),
        ("hub:a/b:fr:train", TWO, "hub:a/b has no configuration 'fr'; it has en, de"),
        ("hub:a/b:x:y:z", TWO, "write hub:NAME[:CONFIG][:SPLIT][@REVISION]"),
        ("hub:https://hub/a/b", TWO, "write hub:NAME[:CONFIG][:SPLIT][@REVISION]"),
    ],
)  # fmt: skip
def test_what_is_not_said_or_unknown_is_listed_in_one_line(
    source: str, splits: dict[str, list[str]], words: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        list(read_hub(source, 1000, FakeDatasets(splits)))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rows_are_checked_and_named_and_only_as_many_are_read_as_are_wanted() -> None:
    datasets = FakeDatasets({"default": ["train"]}, rows=({"text": "x" * 10} for _ in iter(int, 1)))
    assert len(list(read_hub("hub:a/b", 25, datasets))) == 3
    wrong = FakeDatasets({"default": ["train"]}, rows=[{"text": "a"}, {"text": 3}])
    with pytest.raises(RecipeError, match=r"text hub:a/b, row 2: text is 3; it is a string"):
        list(read_hub("hub:a/b", 1000, wrong))


@pytest.mark.parametrize(
    "failure", [RuntimeError("a\n" * 500), KeyError("x"), ConnectionError("no"), EOFError()]
)
def test_whatever_the_library_raises_is_one_line(failure: Exception) -> None:
    class Failing(FakeDatasets):
        def load_dataset(self, *_: Any, **__: Any) -> Iterator[Any]:
            raise failure

    with pytest.raises(RecipeError) as caught:
        list(read_hub("hub:a/b", 1000, Failing({"default": ["train"]})))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300

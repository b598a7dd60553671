"""Documents and JSON lines: what is read, where paths lead, and what each mistake says."""

import gzip
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from lowbit_core.documents import DocumentPath, Section, document_path, load_document, parse_document
from lowbit_core.errors import ConfigError, RecipeError
from lowbit_core.jsonl import read_jsonl


class Circle(Section):
    kind: Literal["circle"]
    radius: int = 1


class Picture(Section):
    kind: Literal["picture"]
    path: DocumentPath


class Layer(Section):
    name: str
    size: int = 0
    path: DocumentPath | None = None


class Drawing(Section):
    title: str = ""
    shape: Annotated[Circle | Picture, Field(discriminator="kind")] | None = None
    layers: tuple[Layer, ...] = ()
    mixed: Circle | Layer | None = None
    palette: Annotated[str, document_path(lambda text, path: text != "default")] = "default"
    ratio: Annotated[int, Field(ge=1)] | Annotated[float, Field(lt=1)] = 1


BUNDLED = {"plain": Path("plain.yaml")}
RENAMED = {"layers.*.width": "layers.*.size", "figure": "shape", "figure.size": "shape.radius"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder" / "drawing.yaml"


def load(file: Path, text: str, *overrides: str) -> Drawing:
    file.write_text(text, encoding="utf-8")
    return load_document(
        "drawing", file, Drawing, bundled=BUNDLED, overrides=overrides, renamed=RENAMED, error=RecipeError
    )


def test_a_path_in_a_file_is_relative_to_the_file_and_one_from_the_command_line_to_the_working_directory(
    file: Path,
) -> None:
    text = "shape: {kind: picture, path: a.png}\nlayers: [{name: b, path: /c/d}]\npalette: e.txt\n"
    read = load(file, text)
    assert read.shape == Picture(kind="picture", path=str(file.parent / "a.png"))
    assert read.layers[0].path == "/c/d"
    assert read.palette == str(file.parent / "e.txt")
    given = load(file, text, "shape.path=f.png", "layers.0.path=g", "palette=default")
    assert given.shape == Picture(kind="picture", path="f.png")
    assert given.layers[0].path == "g"
    assert given.palette == "default"
    whole = load(file, text, "shape={kind: picture, path: ~/h.png}")
    assert isinstance(whole.shape, Picture)
    assert whole.shape.path == str(Path("~/h.png").expanduser())
    assert type(whole.shape.path) is str
    assert type(load(file, text, "title=x").title) is str
    parsed = parse_document("drawing", {"shape": {"kind": "picture", "path": "i"}}, "test", Drawing)
    assert parsed.shape == Picture(kind="picture", path="i")


def test_an_override_reaches_sections_that_the_file_leaves_out_and_items_by_their_number(file: Path) -> None:
    text = "layers: [{name: a}, {name: b, size: 2}]"
    read = load(file, text, "layers.1.size=32", "shape.kind=circle", "shape.radius=3", "ratio=0.5")
    assert read.layers == (Layer(name="a"), Layer(name="b", size=32))
    assert (read.shape, read.ratio) == (Circle(kind="circle", radius=3), 0.5)
    assert load(file, text, "layers.0={name: c}").layers[0] == Layer(name="c")
    assert load(file, "") == Drawing()


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (
            "titel: x",
            (),
            "unknown key 'titel'; did you mean title? allowed here: title, shape, layers, mixed, palette, ratio",
        ),
        (
            "layers: [{name: a}, {nam: b}]",
            (),
            "unknown key 'layers.1.nam'; did you mean name? allowed here: name, size, path",
        ),
        (
            "shape: {kind: circle, radios: 1}",
            (),
            "unknown key 'shape.radios'; did you mean radius? allowed here: kind, radius",
        ),
        ("shape: {kind: picture, radius: 1}", (), "unknown key 'shape.radius'; allowed here: kind, path"),
        ("mixed: {kind: circle, height: 1}", (), "unknown key 'mixed.height'; allowed here: kind, radius"),
        ("shape: {kind: picture}", (), "shape.path is missing; give it"),
        ("shape: {kind: square}", (), "shape = {'kind': 'square'}: allowed is kind: circle, picture"),
        ("ratio: 2.5", (), "ratio = 2.5: "),
        ("layers: [{name: a, size: big}]", (), "layers.0.size = 'big': allowed is a whole number"),
        (
            "layers: [{name: a, width: 3}]",
            (),
            "unknown key 'layers.0.width'; it is called 'layers.*.size' now",
        ),
        ("figure: {size: 3}", (), "unknown key 'figure.size'; it is called 'shape.radius' now"),
        ("figure: circle", (), "unknown key 'figure'; it is called 'shape' now"),
        ("title: x", ("figure=circle",), "unknown key 'figure'; it is called 'shape' now"),
        ("title: x\ntitle: y", (), "is not YAML: the key 'title' stands twice"),
        ("title: [", (), "is not YAML"),
        ("- title", (), "must be a mapping with the keys title, shape"),
        ("title: x", ("title",), "--set 'title' is not key=value"),
        ("title: x", ("title.of=1",), "--set 'title.of=1': title is a value, not a section"),
        ("title: x", ("title=[",), "--set 'title=[': the value is not YAML"),
        ("layers: [{name: a}]", ("layers.1.size=1",), "'1' is none of the items 0 to 0 of the list"),
        ("layers: [{name: a}]", ("layers.first.size=1",), "'first' is none of the items 0 to 0 of the list"),
        ("title: x", ("layers.0.size=1",), "the document has no list layers; write its items there"),
    ],
)
def test_each_mistake_is_one_line_that_names_the_key(
    file: Path, text: str, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(RecipeError) as raised:
        load(file, text, *overrides)
    shown = " ".join(str(raised.value).split())
    assert message in shown
    assert shown.startswith(("drawing ", "--set "))


def test_a_document_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    def find(name: str, bundled: dict[str, Path]) -> Any:
        return load_document("drawing", name, Drawing, bundled=bundled)

    with pytest.raises(
        ConfigError,
        match=r"'plane' is neither a \.yaml file nor one of: plain; did you mean plain\? write the file",
    ):
        find("plane", BUNDLED)
    with pytest.raises(
        ConfigError, match=r"drawing file .*none.yaml does not exist; bundled drawings are: plain"
    ):
        find(str(tmp_path / "none.yaml"), BUNDLED)
    with pytest.raises(ConfigError, match=r"drawing 'plane' is not a .yaml file$"):
        find("plane", {})
    (tmp_path / "latin.yaml").write_bytes(b"title: \xff")
    with pytest.raises(ConfigError, match=r"drawing .*latin.yaml cannot be read: .*utf-8"):
        find(str(tmp_path / "latin.yaml"), BUNDLED)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_json_lines_are_read_with_their_numbers_plain_or_gzipped(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    data = '{"a": 1}\n\n{"b": "\u2028"}'.encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert list(read_jsonl(path, "rows")) == [(1, {"a": 1}), (3, {"b": "\u2028"})]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a"}\n', "line 2: not JSON"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', "line 2: not a JSON object"),
        ("a.jsonl", b'{"a": "\xff"}\n', "not UTF-8"),
        ("a.jsonl.gz", b'{"a": 1}\n', "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n', mtime=0)[:-9], "cannot be read"),
    ],
)
def test_a_wrong_line_is_refused_with_file_and_number(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(RecipeError, match=f"^rows .*{name}.*{message}"):
        list(read_jsonl(path, "rows", RecipeError))
    with pytest.raises(ConfigError, match=r"rows .* cannot be read"):
        list(read_jsonl(tmp_path / "none.jsonl", "rows"))

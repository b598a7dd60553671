"""Where a base model comes from: a local directory, a GGUF file, or the hub at a revision.

Whatever it was, the walk sees one thing: a directory of safetensors that is read tensor by tensor.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lowbit_core.errors import ModelError
from lowbit_quantize.model.sources.contents import ADAPTER, CONFIG, gguf_models, is_weights, obstacle
from lowbit_quantize.model.sources.directory import ModelDirectory, read_json
from lowbit_quantize.model.sources.gguf_parts import all_parts, is_gguf, name_of, parts_of
from lowbit_quantize.model.sources.hub_address import HubAddress, hub_id, page_address
from lowbit_quantize.model.weights import INDEX_NAME

if TYPE_CHECKING:
    from lowbit_quantize.model.sources.gguf_model import GgufModel

LISTED = ("*", f"*/{CONFIG}", f"snapshots/*/{CONFIG}", "onnx/*.onnx")  # what says what a directory is
OF_A_MODEL = (CONFIG, "generation_config.json", "tokenizer.json", "tokenizer_config.json", INDEX_NAME)
CACHED = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")  # how the hub's cache names a repository
SMALL_FILES = ("*.json", "*.model", "*.jinja", "*.txt", "*.py", "*.tiktoken")
WEIGHTS = ("model*.safetensors", INDEX_NAME)


@dataclass(frozen=True)
class ModelReference:
    """A model that was found, not yet read: `path` is a directory, or the first part of a GGUF file.

    `trust_remote_code`: a tokenizer that is code of the model's own may be run.
    """

    name: str
    kind: Literal["directory", "gguf", "hub"]
    path: Path
    revision: str | None = None
    trust_remote_code: bool = False

    @cached_property
    def _source(self) -> "ModelDirectory | GgufModel":
        if self.kind == "gguf":
            # Other models do without its imports.
            from lowbit_quantize.model.sources.gguf_model import GgufModel

            return GgufModel(self.path)
        return ModelDirectory(self.name, self.path, self.trust_remote_code)

    @property
    def config(self) -> Any:
        """The transformers configuration; raises ModelError where there is none or it is of an unknown type."""
        return self._source.config

    @property
    def model_type(self) -> str:
        """The architecture's name, read without building a configuration when the file says it."""
        return self._source.model_type

    @property
    def sha256(self) -> dict[str, str]:
        """Hash of the configuration and of every weight file, taken once."""
        return self._source.sha256

    @property
    def written_config(self) -> dict[str, Any] | None:
        """`config.json` as it was written; None for a GGUF file, which has none."""
        return self._source.written_config

    def tokenizer(self) -> Any:
        """The tokenizer; raises ModelError where there is none."""
        return self._source.tokenizer()


def find_model(name: str, *, trust_remote_code: bool = False) -> ModelReference:
    """Resolve `--model`; raises ModelError when nothing is there."""
    path = _local(name)
    if path is not None:
        found = _directory(path) if path.is_dir() else _file(path)
    elif (address := page_address(name)) is not None:
        found = _from_hub(address)
    elif is_gguf(name):
        raise ModelError(f"model file {name} does not exist; give a .gguf file, a directory or a hub id")
    elif (address := hub_id(name)) is not None:
        found = _from_hub(address)
    else:
        raise ModelError(f"model {name!r} is not a directory, a .gguf file or a hub id OWNER/NAME[@REVISION]")
    return replace(found, trust_remote_code=trust_remote_code)


def _local(name: str) -> Path | None:
    """What is there under this name; None where nothing is."""
    try:
        path = Path(name).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError) as error:  # no right to look, a name too long, a user that is not known
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ModelError(f"model {name[:100]!r} cannot be looked for: {reason}") from error


def _directory(path: Path) -> ModelReference:
    path = path.resolve()
    names = {str(one.relative_to(path)) for pattern in LISTED for one in path.glob(pattern)}
    if files := gguf_models(names):
        return _gguf(path / _only(files, f"model directory {path}"))
    _check(f"model directory {path}", path, names, str(path))
    name, revision = _cached(path)
    return ModelReference(name=name or path.name, kind="directory", path=path, revision=revision)


def _file(path: Path) -> ModelReference:
    """A GGUF file, or a file that stands for the directory it is in."""
    if is_gguf(path.name):
        return _gguf(path)
    if path.name in OF_A_MODEL or is_weights(path.name):
        return _directory(path.parent)
    raise ModelError(
        f"model {str(path)!r} is neither a directory nor a .gguf file; give its directory {path.parent}"
    )


def _gguf(path: Path) -> ModelReference:
    """Symbolic links are not followed: in the hub's cache they lead to files without a name."""
    first = parts_of(path.absolute())[0]
    for directory in first.parents:
        repository, revision = _cached(directory)
        if repository:
            return ModelReference(f"{repository}/{name_of(first.name)}", "gguf", first, revision)
    return ModelReference(name_of(first.name), "gguf", first)


def _from_hub(address: HubAddress) -> ModelReference:
    """Configuration and tokenizer; the weights come with `fetch_weights`, when everything else is known to fit."""
    repository = address.repository
    path = _download(repository, address.revision, SMALL_FILES)
    if address.file is None:
        listed = _listed(repository, path.name)
        names = listed or {one.name for one in path.iterdir()}
        if not (files := gguf_models(names)):
            _check(f"hub repository {repository}", path, names, repository, complete=listed is not None)
            return ModelReference(name=repository, kind="hub", path=path, revision=path.name)
        address = replace(address, file=_only(files, f"hub repository {repository}"))
    file = str(address.file)
    return _gguf(_download(repository, path.name, [all_parts(file)]) / file)


def fetch_weights(reference: ModelReference) -> None:
    """Download the weights of a hub model; nothing to do for the other kinds."""
    if reference.kind == "hub":
        _download(reference.name, reference.revision, WEIGHTS)
        _directory(reference.path)


def _only(files: list[str], place: str) -> str:
    if len(files) > 1:
        raise ModelError(
            f"{place} holds {len(files)} GGUF models, {', '.join(files)}; give one of these files"
        )
    return files[0]


def _check(model: str, path: Path, names: Collection[str], place: str, *, complete: bool = True) -> None:
    """ModelError where these files are no base model; unless they are `complete`, the weights are still to come."""
    said = {name: read_json(path / name) for name in (CONFIG, ADAPTER) if (path / name).is_file()}
    if reason := obstacle(names, said.get(CONFIG, {}), said.get(ADAPTER, {}), place, complete=complete):
        raise ModelError(f"{model} {reason}")


def _cached(path: Path) -> tuple[str | None, str | None]:
    """Repository and revision of a directory of the hub's cache; None of any other."""
    cached = CACHED.fullmatch(path.parent.parent.name)
    if path.parent.name != "snapshots" or not cached:
        return None, None
    return f"{cached['owner']}/{cached['name']}", path.name


def _download(repository: str, revision: str | None, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"model {repository!r} is no local path and could not be had from the hub: {reason}"
        ) from error


def _listed(repository: str, revision: str) -> set[str] | None:
    """Names of all files of a repository, so that what is no base model is refused early; None where there are none."""
    from huggingface_hub import HfApi

    try:
        return set(HfApi().list_repo_files(repository, revision=revision))
    except Exception:  # no network, say; what was downloaded is looked at anyway
        return None

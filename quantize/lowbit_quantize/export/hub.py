"""A checkpoint, or an export with a manifest, on the hub: its files and its model card, in one commit.

Only what the manifest vouches for is sent, after every hash is checked. Without a token nothing is sent and the result
says what would be. The hub is where `huggingface_hub` says (HF_ENDPOINT), the token where it looks (HF_TOKEN, or what
`hf auth login` has stored).
"""

from pathlib import Path
from typing import Any

from lowbit_core.errors import CheckpointError, ConfigError, OutputError
from lowbit_core.log import get_logger
from lowbit_core.manifest import MANIFEST_NAME, Manifest, read_manifest
from lowbit_core.manifest_files import verify_files

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
REFUSED = (401, 403)

log = get_logger("quantize")


class Hub:
    """The target `hub`; `repo` is OWNER/NAME, made where there is none."""

    name = "hub"

    def __init__(self, repo: str | None = None, private: bool = False) -> None:
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # it is public

        if repo is None:
            raise ConfigError("--to hub puts the checkpoint into a repository; give --repo OWNER/NAME")
        if repo.count("/") != 1:
            raise ConfigError(f"--repo {repo} is not OWNER/NAME; give the user or organization and the name")
        try:
            validate_repo_id(repo)
        except HFValidationError as error:
            raise ConfigError(f"--repo {repo}: {error}") from error
        self._repo, self._private = repo, private

    def upload(self, directory: Path) -> dict[str, Any]:
        """Send the files, or say what would be sent; raises CheckpointError, ConfigError or OutputError."""
        from huggingface_hub import constants, get_token

        manifest = read_manifest(directory)
        if manifest is None:
            raise CheckpointError(
                f"{directory} has no {MANIFEST_NAME}; give what `lowbit quantize` or export wrote"
            )
        verify_files(directory, manifest, hashes=True)
        files = {name: (directory / name).stat().st_size for name in (*manifest.files, MANIFEST_NAME)}
        token = get_token()
        if token is None:
            log.warning("no token, so nothing is sent: set HF_TOKEN or run `hf auth login`")
        commit = None if token is None else self._send(directory, manifest, list(files), token)
        return {
            "checkpoint": str(directory),
            "to": self.name,
            "repo": self._repo,
            "private": self._private,
            "endpoint": constants.ENDPOINT,
            "uploaded": commit is not None,
            "commit": commit,
            "bytes": sum(files.values()),
            "files": files,
        }

    def _send(self, directory: Path, manifest: Manifest, names: list[str], token: str) -> str:
        """One commit, whose URL is returned: all files arrive or none."""
        from huggingface_hub import CommitOperationAdd, HfApi

        api = HfApi(token=token, library_name="lowbit")
        try:
            api.create_repo(self._repo, private=self._private or None, exist_ok=True)
            self._look(api.model_info(self._repo), names)
            commit = api.create_commit(
                self._repo,
                [CommitOperationAdd(path_in_repo=name, path_or_fileobj=directory / name) for name in names],
                commit_message=f"{Path(manifest.base.name).name}, quantized by Lowbit",
            )
        except OutputError:
            raise
        except Exception as error:  # whatever the library, its transport and the network raise
            raise OutputError(f"--repo {self._repo}: {_reason(error)}; no file is there") from error
        return str(commit.commit_url)

    def _look(self, info: Any, names: list[str]) -> None:
        """What is in the repository already must not mix with the checkpoint, nor be public against the will."""
        if self._private and not info.private:
            raise OutputError(
                f"--repo {self._repo} is there and public, and --private makes new ones only; give another name"
            )
        there = sorted(file.rfilename for file in info.siblings or [])
        if strange := [name for name in there if name.endswith(WEIGHTS) and name not in names]:
            raise OutputError(
                f"--repo {self._repo} holds {strange[0]}, which is not of this checkpoint; engines would load it too: "
                "delete it or give another name"
            )


def _reason(error: BaseException) -> str:
    """In words, and what to do."""
    causes = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    answers = [answer for one in causes if (answer := getattr(one, "response", None)) is not None]
    status = answers[0].status_code if answers else None
    if status in REFUSED:
        return f"the hub refuses this token ({status}); give one that may write there"
    said = str(causes[-1]).strip() or type(causes[-1]).__name__
    return f"{said.splitlines()[0]}{'' if status else '; is the hub reachable (HF_ENDPOINT)?'}"

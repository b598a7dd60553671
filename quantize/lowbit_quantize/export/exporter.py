"""What an exporter is: a target that reads a finished checkpoint and writes another directory."""

import shutil
import tempfile
from pathlib import Path
from typing import Protocol

from lowbit_core.errors import CheckpointError, OutputError
from lowbit_core.log import get_logger
from lowbit_core.manifest import ExportRecord, Manifest, SizeRecord, write_manifest
from lowbit_core.manifest_files import file_record, record_files
from lowbit_quantize.card import write_card
from lowbit_quantize.catalog import CATALOG, Catalog
from lowbit_quantize.export.checkpoint import Checkpoint
from lowbit_quantize.run.identity import tool_versions

log = get_logger("quantize")


class Exporter(Protocol):
    """One target; `readers` says in words what reads it, `one_file` that it is no directory."""

    @property
    def name(self) -> str: ...
    @property
    def readers(self) -> str: ...
    @property
    def one_file(self) -> bool: ...

    def supports(self, checkpoint: Checkpoint) -> str | None:
        """Why a checkpoint cannot be written so; None where it can. Reads the manifest and the configuration only."""
        ...

    def write(self, checkpoint: Checkpoint, out: Path) -> "Exported":
        """Write all files but the manifest into an empty directory; or the one file that `out` names."""
        ...


class Exported:
    """What an exporter has written: bytes of all tensors and of those of quantized linears, and what is left out.

    `with_manifest`: not where the checkpoint itself lies in it with its own, or where nothing of it is proven.
    """

    def __init__(
        self, tensor_bytes: int, packed_bytes: int, left_out: list[str], *, with_manifest: bool = True
    ) -> None:
        self.tensor_bytes, self.packed_bytes, self.left_out = tensor_bytes, packed_bytes, left_out
        self.with_manifest = with_manifest


def export(directory: Path, exporter: Exporter, out: Path, catalog: Catalog = CATALOG) -> Manifest:
    """Write a checkpoint in another format, whole or not at all; raises CheckpointError or OutputError."""
    checkpoint = Checkpoint(directory, catalog)
    if reason := exporter.supports(checkpoint):
        raise CheckpointError(f"{directory} cannot be exported to {exporter.name}: {reason}")
    _refuse_taken(out, one_file=exporter.one_file)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
            work = Path(temporary) / out.name
            if not exporter.one_file:
                work.mkdir()
            exported = exporter.write(checkpoint, work)
            for what in exported.left_out:
                log.warning("%s holds no %s: left out", exporter.name, what)
            manifest = _manifest(checkpoint.manifest, exporter.name, exported, work)
            if not exporter.one_file and exported.with_manifest:
                card = write_card(work, manifest, checkpoint.directory)
                files = manifest.files | {card.name: file_record(card)}
                manifest = manifest.model_copy(update={"files": files})
                write_manifest(work, manifest)
            if out.is_dir():
                out.rmdir()
            shutil.move(work, out)
    except OSError as error:
        raise OutputError(f"output {out}: {error.strerror or error}; nothing is kept") from error
    return manifest


def _refuse_taken(out: Path, *, one_file: bool) -> None:
    if one_file and (out.exists() or out.is_symlink()):
        raise OutputError(f"output {out} is there already; give the name of a new file")
    if not one_file and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"output {out} is not an empty directory; give one that is new or empty")


def _manifest(before: Manifest, name: str, exported: Exported, out: Path) -> Manifest:
    size = before.size
    return before.model_copy(
        update={
            "kv_cache": None,
            "modules": [module.model_copy(update={"bytes": None}) for module in before.modules],
            "size": SizeRecord(
                parameters=size.parameters,
                base_bytes=size.base_bytes,
                bytes=exported.tensor_bytes,
                quantized_parameters=size.quantized_parameters,
                linear_bits_per_weight=round(
                    8 * exported.packed_bytes / max(1, size.quantized_parameters), 4
                ),
            ),
            "files": record_files(out, before.base.copied) if out.is_dir() and exported.with_manifest else {},
            "versions": tool_versions(),
            "export": ExportRecord(to=name, left_out=exported.left_out),
        }
    )

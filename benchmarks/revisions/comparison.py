"""Two checkpoints, tensor by tensor and byte by byte, read off the safetensors files themselves."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.revisions.trees import Ended

MANIFEST = "lowbit.json"


@dataclass(frozen=True)
class Compared:
    """What became of a case; `differs` says for each tensor that is not the same how it differs."""

    name: str
    outcome: str  # equal, differs, refused by both, failed
    tensors: int = 0
    differs: tuple[str, ...] = ()
    shards_equal: bool = False
    config_equal: bool = False
    mean_kld: tuple[float | None, float | None] = (None, None)
    said: tuple[str, ...] = ()

    @property
    def held(self) -> bool:
        return self.outcome in ("equal", "refused by both")


def compared(name: str, ended: tuple[Ended, Ended], old: Path, new: Path) -> Compared:
    """Compare the checkpoints of two runs that ended so."""
    said = tuple(f"{tree}: {end.status}: {end.said}" for tree, end in zip(("old", "new"), ended, strict=True))
    statuses = [end.status for end in ended]
    if statuses == [2, 2]:
        return Compared(name, "refused by both", said=said)
    if statuses != [0, 0]:
        return Compared(name, "failed", said=said)
    before, after = tensors(old), tensors(new)
    differs = tuple(_differences(before, after))
    return Compared(
        name,
        "differs" if differs else "equal",
        tensors=len(before),
        differs=differs,
        shards_equal=_shards(old) == _shards(new),
        config_equal=_json(old / "config.json") == _json(new / "config.json"),
        mean_kld=(_mean_kld(old), _mean_kld(new)),
    )


def tensors(checkpoint: Path) -> dict[str, tuple[str, list[int], str]]:
    """Data type, shape and hash of every tensor of a checkpoint, by name."""
    found = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:start]).items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                digest = hashlib.sha256(data[start + first : start + last]).hexdigest()
                found[name] = entry["dtype"], entry["shape"], digest
    return found


def _differences(
    before: dict[str, tuple[str, list[int], str]], after: dict[str, tuple[str, list[int], str]]
) -> list[str]:
    if not before and not after:
        return ["neither holds a tensor"]
    found = []
    for name in sorted(before.keys() | after.keys()):
        if name not in after or name not in before:
            found.append(f"{name}: only in the {'old' if name in before else 'new'}")
        elif before[name][:2] != after[name][:2]:
            found.append(f"{name}: {before[name][:2]} became {after[name][:2]}")
        elif before[name] != after[name]:
            found.append(f"{name}: other bytes")
    return found


def _shards(checkpoint: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in checkpoint.glob("*.safetensors")
    }


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _mean_kld(checkpoint: Path) -> float | None:
    """Of the quality that the run measured itself; an exported checkpoint may have none."""
    manifest = _json(checkpoint / MANIFEST) or {}
    found = manifest.get("quality", {}).get("mean_kld")
    return None if found is None else float(found)

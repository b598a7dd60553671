"""The mix of a checkpoint: its quantized linears, those that are stored and were made alike together."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lowbit_core.manifest import Manifest, ModuleRecord


@dataclass(frozen=True)
class ModuleGroup:
    """Linears of a checkpoint that are stored and were made alike."""

    scheme: str
    bits: float
    group_size: int | None
    methods: tuple[str, ...]
    linears: int
    weights: int | None = None  # of all of them, where each says how many
    stored_bytes: int | None = None
    sparsity: str | None = None  # the pattern of its zeros, where a method made them
    zeros: float | None = None  # their share

    @property
    def bits_per_weight(self) -> float | None:
        """With scales and zero points."""
        return 8 * self.stored_bytes / self.weights if self.weights and self.stored_bytes else None

    def __str__(self) -> str:
        size = "channels" if self.group_size is None else f"groups of {self.group_size}"
        words = f"{self.linears} x {self.scheme} in {size} by {', then '.join(self.methods)}"
        return words if self.sparsity is None else f"{words}, {self.sparse}"

    @property
    def sparse(self) -> str:
        """The pattern of its zeros and their share; empty where no method made any."""
        return "" if self.zeros is None else f"sparsity {self.sparsity}, {self.zeros:.1%} zeros"


def module_groups(manifest: Manifest) -> list[ModuleGroup]:
    """The mix of a checkpoint, the most frequent first."""
    alike: dict[tuple[tuple[str, float, int | None, tuple[str, ...]], str | None], list[ModuleRecord]] = {}
    for one in manifest.modules:
        pattern = one.sparsity.pattern if one.sparsity else None
        kind = (one.scheme, one.bits, one.group_size, tuple(one.methods))
        alike.setdefault((kind, pattern), []).append(one)
    ordered = sorted(alike.items(), key=lambda item: -len(item[1]))
    return [
        ModuleGroup(
            *kind,
            len(some),
            _sum(one.weights for one in some),
            _sum(one.bytes for one in some),
            pattern,
            _zeros(some),
        )
        for (kind, pattern), some in ordered
    ]


def _zeros(some: Sequence[ModuleRecord]) -> float | None:
    """The share of zeros in all of them, where a method made some."""
    counts = [(one.sparsity.zeros, one.weights or 1) for one in some if one.sparsity]
    return sum(share * count for share, count in counts) / sum(n for _, n in counts) if counts else None


def _sum(counts: Iterable[int | None]) -> int | None:
    """None where one is not known: a partial sum would pass for the whole."""
    known = list(counts)
    return None if None in known else sum(count for count in known if count is not None)


def weights_summary(manifest: Manifest) -> dict[str, str]:
    """Schemes, bits, group sizes and methods of the quantized linears; several values are joined by `+`."""
    groups = module_groups(manifest)

    def joined(values: list[str]) -> str:
        return "+".join(dict.fromkeys(values))

    return {
        "scheme": joined([group.scheme for group in groups]) or "none",
        "bits": joined([f"{group.bits:g}" for group in groups]),
        "group_size": joined([str(group.group_size or "channel") for group in groups]),
        "methods": joined([method for group in groups for method in group.methods]),
    }

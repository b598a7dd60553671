"""What is not quantized or not there, with the reason that the manifest has for it."""

from collections.abc import Iterable, Mapping

from lowbit_core.checkpoint_page.places import patterns, short
from lowbit_core.manifest import Manifest
from lowbit_core.pages.html import bullets, paragraph

MOST_REASONS, MOST_PATTERNS, MOST_LETTERS = 40, 6, 300
NO_REASON = "the manifest has no reason (of an older version)"


def left_out_parts(manifest: Manifest) -> list[str]:
    """Lists of what stays as it is and of what is left out; sentences where nothing is."""
    because, carried, exported = manifest.unquantized_because, manifest.base.carried, manifest.export
    stays = {name: because.get(name, NO_REASON) for name in (*because, *manifest.unquantized)}
    other = [f"plain transformers {one}" for one in manifest.unopened]
    other += [f"carried over as they are: {_counted(carried)}"] if carried else []
    other += [f"not in the format {exported.to}: {what}" for what in exported.left_out] if exported else []
    return [
        "<h3>Not quantized</h3>",
        bullets(_by_reason(stays)) if stays else paragraph("Every linear of the decoder is quantized."),
        "<h3>Not in the checkpoint</h3>",
        bullets(_by_reason(manifest.base.left_out))
        if manifest.base.left_out
        else paragraph("Nothing of the base is left out."),
        *(
            ["<h3>To know</h3>", bullets(short(one, MOST_LETTERS) for one in other[:MOST_REASONS])]
            if other
            else []
        ),
    ]


def _by_reason(reasons: Mapping[str, str]) -> list[str]:
    """`reason: 12 (name × 8, name × 4)`, the most frequent first."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    ordered = sorted(names.items(), key=lambda one: -len(one[1]))
    shown = [f"{short(reason, MOST_LETTERS)}: {_counted(some)}" for reason, some in ordered[:MOST_REASONS]]
    left = len(ordered) - MOST_REASONS
    return [*shown, *([f"and for {left} other reasons"] if left > 0 else [])]


def _counted(names: Iterable[str]) -> str:
    found = patterns(names)
    shown = [f"{short(name)} × {count}" for name, count in found.most_common(MOST_PATTERNS)]
    more = [f"{len(found) - MOST_PATTERNS} others"] if len(found) > MOST_PATTERNS else []
    return f"{found.total():,} ({', '.join(shown + more)})"

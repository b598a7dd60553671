"""The model card: `README.md` of a checkpoint, which the hub shows.

It says what the manifest says and no more, for a person: what it was made of, how close it is to that, how to serve it.
The base's licence and languages are carried over from its own card. It has no date, so that a run that is made again
gives the same bytes.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from lowbit_core.manifest import DivergenceRecord, Manifest
from lowbit_core.module_groups import module_groups
from lowbit_core.serving import serving_commands
from lowbit_core.tensorrt_llm import tensorrt_llm_reads
from lowbit_quantize.run.companions import CARD

CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag")
FENCE = "---"
TRANSFORMERS = "compressed-tensors"
LIBRARIES = {
    "gguf": "llama.cpp",
    "mlx": "mlx",
    "onnx": "onnxruntime-genai",
    "openvino": "openvino",
}  # that read an export, where transformers does not


def write_card(directory: Path, manifest: Manifest, base: Path | None = None) -> Path:
    """Write the card of a checkpoint; `base` is a directory whose own card may have a licence. Returns the file."""
    file = directory / CARD
    head = {**_carried(base), **_tags(manifest)}
    text = yaml.safe_dump(head, sort_keys=False, allow_unicode=True)
    file.write_text(
        f"{FENCE}\n{text}{FENCE}\n\n" + "\n".join(_lines(manifest, _quantization(directory))) + "\n",
        encoding="utf-8",
    )
    return file


def _quantization(directory: Path) -> Mapping[str, Any]:
    """What config.json says of it."""
    file = directory / "config.json"
    said = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    found: Mapping[str, Any] = said.get("quantization_config") or {}
    return found


def _carried(base: Path | None) -> dict[str, Any]:
    """What the head of the base's card says that holds for the checkpoint too; nothing of a card that is unreadable."""
    if base is None or not (base / CARD).is_file():
        return {}
    _, fence, rest = (base / CARD).read_text(encoding="utf-8", errors="replace").partition(f"{FENCE}\n")
    try:
        head = yaml.safe_load(rest.partition(f"\n{FENCE}")[0]) if fence else None
    except (yaml.YAMLError, ValueError):  # the latter of dates that are none
        return {}
    return {key: head[key] for key in CARRIED if key in head} if isinstance(head, dict) else {}


def _tags(manifest: Manifest) -> dict[str, Any]:
    base, schemes = manifest.base, sorted({module.scheme for module in manifest.modules})
    to = manifest.export.to if manifest.export else TRANSFORMERS
    known = {"base_model": base.name, "base_model_relation": "quantized"} if base.kind == "hub" else {}
    return {
        **known,
        "library_name": LIBRARIES.get(to, "transformers"),
        "tags": ["lowbit", to, *schemes],
    }


def _lines(manifest: Manifest, quantization: Mapping[str, Any]) -> Iterator[str]:
    size = manifest.size
    yield f"# {Path(manifest.base.name).name}, {_words(manifest) or 'not quantized'}"
    yield ""
    yield (
        f"Made of `{manifest.base.name}` ({manifest.base.model_type}, {manifest.base.dtype}) by Lowbit: "
        f"{size.bytes / 1e9:.2f} GB where the base has {size.base_bytes / 1e9:.2f} GB, "
        f"{size.linear_bits_per_weight:.2f} bits for each weight of the linears below."
    )
    yield from _modules(manifest)
    yield from _quality(manifest)
    yield from _serving(manifest, quantization)


def _words(manifest: Manifest) -> str:
    sparse = (f" ({one.sparsity.pattern} sparse)" if one.sparsity else "" for one in manifest.modules)
    return " and ".join(
        sorted({one.scheme + words for one, words in zip(manifest.modules, sparse, strict=True)})
    )


def _modules(manifest: Manifest) -> Iterator[str]:
    counted = Counter(
        (
            module.scheme,
            module.group_size or "channel",
            "+".join(module.methods),
            module.inputs or "as they are",
        )
        for module in manifest.modules
    )
    yield from ("", "| scheme | groups | chosen by | inputs | linears |", "|---|---|---|---|---|")
    for (scheme, group, methods, inputs), count in sorted(counted.items(), key=str):
        yield f"| {scheme} | {group} | {methods} | {inputs} | {count} |"
    yield from (f"\n{words}" for words in _zeros(manifest))
    if manifest.kv_cache:
        yield from ("", f"Keys and values: {manifest.kv_cache.dtype}, with calibrated scales in the files.")
    if manifest.structure:
        yield from ("", f"Taken out of the base: {manifest.structure}.")
    if manifest.experts and manifest.experts.kept < manifest.experts.experts:
        how = f"merged ({manifest.experts.consolidate})" if manifest.experts.consolidate else "dropped"
        yield from (
            "",
            f"Routed experts: {manifest.experts.kept} of {manifest.experts.experts} in each layer, chosen by "
            f"{manifest.experts.criterion}; the others were {how}.",
        )


def _zeros(manifest: Manifest) -> Iterator[str]:
    """What of the weights a method set to zero, by pattern."""
    for group in module_groups(manifest):
        if group.zeros is not None:
            yield (
                f"Of {group.linears} linears {group.zeros:.1%} of the weights are zero (sparsity {group.sparsity}, by "
                f"{' and '.join(group.methods)}). They are stored as zeros: the files are no smaller for them."
            )


def _quality(manifest: Manifest) -> Iterator[str]:
    quality = manifest.quality
    yield from ("", "## How close it is to its base", "")
    yield (
        f"On {quality.predictions:,} predictions of held-out text (`{quality.heldout.dataset}`), compared while it "
        "was made; KL divergence in nats a token, ± one standard error."
    )
    yield from (
        "",
        "| | mean KL | 99th percentile | same first choice | perplexity, of the base's |",
        "|---|---|---|---|---|",
    )
    yield _row("this checkpoint", quality)
    for name, one in (
        ("the base in its own type, beside float32", quality.noise_floor),
        ("the FP8 cache alone", quality.kv_cache_alone),
        ("this checkpoint on its calibration text", quality.calibration),
        ("this checkpoint on what was set aside of that text", quality.set_aside),
    ):
        if one is not None:
            yield _row(name, one)
    if len(quality.domains) > 1:
        yield from ("", "| domain | mean KL |", "|---|---|")
        for domain, figures in quality.domains.items():
            yield f"| {domain} | {_with_error(figures, 'mean_kld', 'kld_stderr')} |"
    if manifest.export:
        for what in manifest.export.left_out:
            yield from ("", f"This format holds no {what}; the figures are of the checkpoint that has them.")


def _row(name: str, one: DivergenceRecord | Any) -> str:
    kld, ratio = f"{one.mean_kld:.4f} ± {one.kld_stderr:.4f}", f"{one.perplexity_ratio:.4f}"
    return f"| {name} | {kld} | {one.kld_p99:.4f} | {one.top1_agreement:.1%} | {ratio} |"


def _with_error(figures: Mapping[str, float], value: str, error: str) -> str:
    return f"{figures[value]:.4f}" + (f" ± {figures[error]:.4f}" if error in figures else "")


def _serving(manifest: Manifest, quantization: Mapping[str, Any]) -> Iterator[str]:
    yield from ("", "## How to serve it", "", "```sh")
    yield from serving_commands(manifest, "./DIRECTORY")
    yield "```"
    if manifest.unopened:
        yield from ("", *(f"Plain transformers {one}." for one in manifest.unopened))
    elif manifest.export is None:
        yield from ("", "```python")
        yield "from transformers import AutoModelForCausalLM"
        yield 'model = AutoModelForCausalLM.from_pretrained("./DIRECTORY", dtype="auto")'
        yield "```"
        yield from (
            "",
            "`lowbit export ./DIRECTORY --to gguf --out model.gguf` writes it for llama.cpp where its scheme fits; "
            "`--help` has the other runtimes.",
        )
    if manifest.export is None and quantization.get("config_groups"):
        algorithm, reason = tensorrt_llm_reads(quantization)
        read = f"reads it as it is, as {algorithm}" if algorithm else f"does not read it as it is: {reason}"
        yield from ("", f"TensorRT-LLM, by its own rules and not run, {read}.")
    yield from ("", "The recipe, every module's error and the hashes of all files are in `lowbit.json`.")

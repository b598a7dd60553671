"""`lowbit.json`, the manifest beside a checkpoint (docs/checkpoint.md).

Written last and atomically: no manifest, no checkpoint. Nothing that vLLM needs lives only here. It knows
nothing of tensors: it names files, sizes, hashes and measured numbers.

`format_version` is raised when a reader of the version before would be misled. A field that is new and may be left
out does not raise it: readers pass over what they do not know.
"""

import json
import os
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from lowbit_core.documents import describe_error
from lowbit_core.errors import CheckpointError
from lowbit_core.structure import StructureRecord

MANIFEST_NAME = "lowbit.json"
PROGRESS_NAME = "lowbit.partial.json"  # present while a quantize run is unfinished
FORMAT_VERSION: Final = 2


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, ser_json_inf_nan="strings")


class BaseModelRecord(_Record):
    """Where the weights came from."""

    name: str
    kind: str  # directory, gguf or hub
    revision: str | None
    model_type: str
    dtype: str
    sha256: dict[str, str]
    remote_code: bool = False  # whether a tokenizer that is code of the base's own might be run
    # The published numbers that were dequantized: "FP8 in blocks of 128 x 128".
    dequantized: str | None = None
    carried: list[str] = []  # tensors that no module of the model reads, stored untouched
    copied: list[str] = []  # files beside its weights that lie in the checkpoint
    left_out: dict[str, str] = {}  # tensors and files that are not in the checkpoint, with the reason


class SizeRecord(_Record):
    """Bytes are safetensors payload on disk; `linear_bits_per_weight` counts codes, scales and zero points."""

    parameters: int
    base_bytes: int
    bytes: int
    quantized_parameters: int
    linear_bits_per_weight: float


class SparsityRecord(_Record):
    """Weights of a linear that a method set to zero: `pattern` is 2:4, 4:8 or the share that was asked for.

    `zeros` is the share that is zero in what is served, those that a scheme rounds to zero as well; `sha256` is of
    where they are, a bit for each weight, row by row.
    """

    pattern: str
    zeros: float
    sha256: str


class ModuleRecord(_Record):
    """One linear that is quantized, or pruned and kept in 16 bits.

    `error` is the relative squared output error on the calibration tokens. `scheme` is a name of compressed-tensors, or
    BF16 or FP16; `group_size` is null where parameters span all inputs of an output
    channel; `methods` were applied in this order; `alpha` is the exponent of the scale of its inputs, if it has one
    (1 where SmoothQuant's is the minimum itself, and no power).
    `inputs` says how engines round what it reads ("int8 by token"), `input_scale` is what they divide it by where
    that was calibrated (in NVFP4 its reciprocal, the global scale that is stored). `weights` counts its codes, `bytes`
    are those of codes, scales and zero points.
    """

    name: str
    scheme: str
    bits: float
    group_size: int | None
    symmetric: bool
    methods: list[str]
    error: float
    alpha: float | None
    inputs: str | None = None
    input_scale: float | None = None
    weights: int | None = None
    bytes: int | None = None
    sparsity: SparsityRecord | None = None


class KVLayerRecord(_Record):
    """One layer's scales, or those of its heads; each maps the largest calibrated magnitude to the format's largest
    value, or clips it.
    """

    layer: int
    k_scale: float | tuple[float, ...]
    v_scale: float | tuple[float, ...]
    k_source: str = "maximum"  # or clip, or clip in N of M heads
    v_source: str = "maximum"


class KVCacheRecord(_Record):
    """Scales by layer. `skip_layers` were measured with keys and values in the model's type, and are to run so (vLLM's
    --kv-cache-dtype-skip-layers); their scales are for readers that know no such layers.
    """

    dtype: str
    source: str
    layers: list[KVLayerRecord]
    skip_layers: list[int] = []
    strategy: Literal["tensor", "attn_head"] = "tensor"


class UnderCalibratedExpert(_Record):
    """An expert, by its number after pruning, that saw fewer tokens than its linears have inputs."""

    layer: int
    expert: int
    tokens: int


class TrialRecord(_Record):
    """Passes that were on trial, mean KL on held-out text with and without them; `kept`: they are in the checkpoint.

    The choice was made on the text that `quality` reports, which flatters the chosen one a little.
    """

    passes: list[str]
    kept: bool
    kld_without: float
    kld_with: float


class ExpertsRecord(_Record):
    """Routed experts before and after pruning; `kept_by_layer` holds the base model's numbers of those that stay.

    Those that are `under_calibrated` borrowed the statistics that they lack from their layer. Where layers were pruned,
    `saliency_by_layer` has each of the base's experts' score by `criterion`, `tokens_by_layer` how many calibration
    tokens it was given. Where experts were merged, `consolidate` and `similarity` say how, and `absorbed_by_layer`
    which one of those that stay absorbed each that went, both in the base model's numbers.
    """

    experts: int
    kept: int
    criterion: str | None
    kept_by_layer: dict[int, list[int]]
    under_calibrated: list[UnderCalibratedExpert]
    consolidate: str | None = None
    similarity: str | None = None
    absorbed_by_layer: dict[int, dict[int, int]] = {}
    saliency_by_layer: dict[int, list[float]] = {}
    tokens_by_layer: dict[int, list[int]] = {}


class UnopenedRecord(_Record):
    """Linears that plain transformers does not open, of which `example` is the first; `reader` has unpacked each."""

    scheme: str
    linears: int
    example: str
    reader: str

    def __str__(self) -> str:
        return (
            f"does not open {self.linears} linears in {self.scheme} ({self.example}, …); {self.reader} does"
        )


class TextRecord(_Record):
    """A tokenized text: what it was and a hash of the exact token ids."""

    dataset: str
    num_samples: int
    max_seq_length: int
    tokens: int
    seed: int
    sha256: str
    set_aside_sha256: str | None = None  # of the calibration text: what was set aside of it


class DivergenceRecord(_Record):
    """One model against another on some held-out sequences; KL in nats per token, errors clustered by sequence."""

    sequences: int
    predictions: int
    mean_kld: float
    kld_stderr: float
    kld_p99: float
    kld_p99_stderr: float
    kld_max: float
    kld_max_stderr: float
    top1_agreement: float
    top1_stderr: float
    perplexity_ratio: float
    perplexity_ratio_stderr: float


class QualityRecord(_Record):
    """The compressed model against its base on held-out text; KL in nats per token, errors clustered by sequence.

    `noise_floor` is the base model in the serving dtype against itself in float32, `kv_cache_alone` the base model
    with nothing but the FP8 cache against itself, `calibration` the compressed model on text that it was calibrated
    with (where a method lets the base model's calibration text walk too): what it loses less there is fitted to that.
    `set_aside` is on text of the same source that it was not calibrated with. What is null was not measured, or is of
    an older version.
    """

    heldout: TextRecord
    predictions: int
    mean_kld: float
    kld_stderr: float
    kld_p99: float
    kld_p99_stderr: float | None = None
    kld_max: float
    kld_max_stderr: float | None = None
    top1_agreement: float
    top1_stderr: float
    perplexity_base: float
    perplexity: float
    perplexity_ratio: float
    perplexity_ratio_stderr: float | None = None
    domains: dict[str, dict[str, float]]
    kv_cache_included: bool
    noise_floor: DivergenceRecord | None = None
    kv_cache_alone: DivergenceRecord | None = None
    calibration: DivergenceRecord | None = None
    set_aside: DivergenceRecord | None = None

    @property
    def overfitting(self) -> float | None:
        """Mean KL on what was set aside of the calibration text, or else on held-out text, over that on the rest."""
        if self.calibration is None or not self.calibration.mean_kld > 0:
            return None
        other = self.mean_kld if self.set_aside is None else self.set_aside.mean_kld
        return other / self.calibration.mean_kld


class GateRecord(_Record):
    limits: dict[str, float]
    accepted: bool
    reasons: list[str]


class FileRecord(_Record):
    sha256: str
    bytes: int


class RunRecord(_Record):
    """What the process has cost that finished the run; `phases_s` are the parts of its wall time, in their order."""

    device: str
    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    phases_s: dict[str, float] = {}


class ExportRecord(_Record):
    """A checkpoint that was made out of another, whose quality this manifest repeats.

    `left_out` says what that one has and this format cannot hold.
    """

    to: str
    left_out: list[str]


class StepRecord(_Record):
    """One of the steps that made a checkpoint, in their order: what it cost and how close to the base it left it.

    `what` is for a person; KL is to the base of all steps, on the held-out text of the last. A step that trained has
    more: KL before it, how many numbers it trained, how many bytes of the files are others now, what it was told
    (`settings`), its text, and its curve as (step, mean KL on rows set aside, mean loss since); `best_step` of it is
    what the checkpoint has. `identity` is what decided its result.
    """

    step: str
    what: str
    mean_kld: float
    kld_stderr: float
    bytes: int
    seconds: float
    cpu_seconds: float
    kld_before: float | None = None
    kld_before_stderr: float | None = None
    trained_parameters: int | None = None
    changed_bytes: int | None = None
    settings: dict[str, Any] = {}
    data: TextRecord | None = None
    curve: list[tuple[int, float, float | None]] = []
    best_step: int | None = None
    identity: dict[str, Any] = {}


class Manifest(_Record):
    """The whole manifest; `unquantized` names the decoder's linears that stay as they are, `unquantized_because` says
    why, and why the head, routers and gates do.

    `unopened` is empty where plain transformers has opened all of the checkpoint.

    `figures` are what passes have measured of each layer, by their names. `steps` is empty of a checkpoint that one run
    of quantize has made; after a recovery errors of modules are those before it.
    """

    format_version: int = FORMAT_VERSION
    created: str
    base: BaseModelRecord
    recipe: dict[str, Any]
    size: SizeRecord
    modules: list[ModuleRecord]
    unquantized: list[str] = []
    unquantized_because: dict[str, str] = {}
    unopened: list[UnopenedRecord] = []
    kv_cache: KVCacheRecord | None
    experts: ExpertsRecord | None = None
    structure: StructureRecord | None = None
    trial: TrialRecord | None = None
    figures: dict[int, dict[str, float]] = {}
    calibration: TextRecord | None
    quality: QualityRecord
    gate: GateRecord
    files: dict[str, FileRecord]
    versions: dict[str, str]
    run: RunRecord
    export: ExportRecord | None = None
    steps: list[StepRecord] = []


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `lowbit.json` atomically: a reader sees the whole file or none."""
    temporary = directory / f"{MANIFEST_NAME}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        file.write(manifest.model_dump_json(indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(directory / MANIFEST_NAME)


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of a checkpoint; None where a plain model directory has none.

    Raises CheckpointError when the directory is missing, an unfinished run, or its manifest unreadable.
    """
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory} is not a directory; give a checkpoint that `lowbit quantize --out` wrote"
        )
    path = directory / MANIFEST_NAME
    if not path.exists():
        if (directory / PROGRESS_NAME).exists():
            raise CheckpointError(
                f"{directory} is an unfinished run ({PROGRESS_NAME} without {MANIFEST_NAME}); "
                "run the same `lowbit` command again to complete it"
            )
        return None
    try:
        text = path.read_text(encoding="utf-8")
        _refuse_other_version(path, json.loads(text))
        return Manifest.model_validate_json(text)
    except (ValueError, OSError) as error:
        detail = describe_error(error, Manifest) if isinstance(error, ValidationError) else str(error)
        raise CheckpointError(f"{path} is not a version {FORMAT_VERSION} manifest: {detail}") from error


def _refuse_other_version(path: Path, data: Any) -> None:
    version = data.get("format_version") if isinstance(data, dict) else None
    if isinstance(version, int) and version != FORMAT_VERSION:
        newer = f" and this Lowbit reads version {FORMAT_VERSION}; install a newer Lowbit"
        older = f", of an older Lowbit; quantize the model again (this one reads version {FORMAT_VERSION})"
        raise CheckpointError(
            f"{path} is a version {version} manifest{newer if version > FORMAT_VERSION else older}"
        )

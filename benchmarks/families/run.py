"""Family by family: what is found, whether checkpoints reload to what the walk measured, and whether vLLM serves them.

    python benchmarks/families/run.py [--only FAMILY …] [--json benchmarks/families/results/families.json]

Each family is the default configuration of transformers' class, narrow and with as few layers as show all kinds, with
seeded weights that were taught four sentences. It is found (groups, folds), quantized by each recipe below in a process
of its own, reloaded by plain transformers, and the reloaded model's mean KL from the base, on the same tokens, held
against the walk's. Its 4-bit checkpoint (routed experts in bfloat16, which every processor runs) answers in stock vLLM
and in transformers, and the texts are compared up to near ties; where they differ, so are the base's. What does not
work is quoted in the words of whoever said no. The tables below give sizes only where the default has none that a model
can be built from.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.families.served import served, words  # noqa: E402

FAMILIES = [
    "llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text", "olmo2", "olmoe", "qwen3_moe",
    "qwen2_moe", "mixtral", "deepseek_v2", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next",
    "gemma3n_text", "gemma4_text", "glm4", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "deepseek_v3",
    "deepseek_v32", "deepseek_v4", "kimi_linear", "minimax_m2", "ministral3", "nemotron_h", "gpt_oss",
    "granite", "granitemoe", "granitemoehybrid", "lfm2", "lfm2_moe", "cohere", "cohere2", "exaone4", "ernie4_5",
    "ernie4_5_moe", "smollm3", "seed_oss", "olmo3", "hunyuan_v1_dense", "hunyuan_v1_moe", "phi", "phimoe",
    "starcoder2", "falcon_h1", "llama4_text", "mistral4", "qwen4_exp_text", "arcee", "apertus",
    "qwen3_vl", "qwen3_5", "qwen3_5_moe", "gemma3", "mistral3", "glm5_next",
]  # fmt: skip
RECIPES: dict[str, dict[str, Any]] = {
    "gptq": {"scheme": "W4A16", "group_size": 32, "methods": ["gptq"]},
    "awq+gptq": {"scheme": "W4A16", "group_size": 32, "methods": ["awq", "gptq"]},
    "W8A8": {"scheme": "W8A8", "methods": ["smoothquant", "gptq"]},
}
SERVED = {"scheme": "W4A16", "group_size": 32, "methods": ["gptq"]}
LIMIT_S = 1200.0
STACKS_ONLY = "transformers opens in stacks only"
# Nats between the walk's mean KL and the reloaded model's: of weights alone, and where inputs are rounded, which
# transformers does in bfloat16 and the walk as engines do; the latter as a share of the KL.
EQUAL, EQUAL_SHARE, ROUNDED_SHARE = 2e-3, 0.005, 0.2
# As wide as in the default: vLLM's latent attention on a CPU has kernels for one size, and groups of 32 need 32 inputs.
# A chunk of attention must hold whole blocks of vLLM's cache.
KEPT_WIDE = (
    "kv_lora_rank",
    "qk_rope_head_dim",
    "hidden_size_per_layer_input",
    "laurel_rank",
    "attention_chunk_size",
)
LATE_SHARED = {  # as gemma's E-models have it: the last layers read the keys and values of earlier ones
    "num_hidden_layers": 5,
    "layer_types": ["sliding_attention"] * 2 + ["full_attention", "sliding_attention", "full_attention"],
    "num_kv_shared_layers": 2,
}
PLAIN_POSITIONS = {"head_dim": 128, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
NO_AUX = {
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
}  # vLLM asks for these, every published file has them
SIZES: dict[str, dict[str, Any]] = {
    "deepseek_v3": NO_AUX,
    "deepseek_v32": NO_AUX,
    "glm_moe_dsa": NO_AUX,
    "glm4_moe_lite": {"first_k_dense_replace": 1},  # as before
    "minimax_m2": {"rotary_dim": 64, "scoring_func": "sigmoid", "use_routing_bias": True},  # as before
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 8},
    "gemma3n_text": LATE_SHARED,
    "gemma4_text": LATE_SHARED,
    "falcon_h1": {"mamba_d_ssm": 512, "mamba_d_state": 32, "mamba_chunk_size": 32},  # torch's own loops are slow
    "glm4_moe": {"head_dim": 128},
    "qwen4_exp_text": {  # its default names none of its indexer's sizes
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "hunyuan_v1_dense": PLAIN_POSITIONS,
    "hunyuan_v1_moe": {**PLAIN_POSITIONS, "num_experts": 8, "moe_topk": 2},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention", "mamba", "attention"], "num_hidden_layers": 4,
        "mamba_d_head": 16, "mamba_n_heads": 512,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "mlp", "moe"], "num_hidden_layers": 4},
}  # fmt: skip


AS_WIDE = {
    "lfm2": ("conv_dim", "block_dim"),
    "lfm2_moe": ("conv_dim", "block_dim"),
}  # as hidden states; as before


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="FAMILY")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--table", action="store_true", help="print what --json holds as a table, measure nothing"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)  # in a process of its own
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(_family(arguments.one)))
        return 0
    if arguments.table:
        print(_table(json.loads(arguments.json.read_text())["families"]))
        return 0
    rows = (
        json.loads(arguments.json.read_text())["families"]
        if arguments.json and arguments.json.exists()
        else {}
    )
    for family in arguments.only or FAMILIES:
        rows[family] = row = _apart(family)
        print(_line(family, row), flush=True)
        if arguments.json:
            left = [name for name in FAMILIES if name not in rows]
            result = {**_facts(), "not_run": left, "families": rows}
            arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def _apart(family: str) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).resolve()), "--one", family]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return {"no": f"not ended after {LIMIT_S:.0f} s"}
    lines = ended.stdout.strip().splitlines()
    if ended.returncode or not lines:
        return {"no": (ended.stderr.strip().splitlines() or ["ended without a word"])[-1][:300]}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def _facts() -> dict[str, Any]:
    from benchmarks.quantizers.provenance import hardware, versions

    return {"hardware": hardware(), "versions": versions(sys.executable)}


def _line(family: str, row: dict[str, Any]) -> str:
    if "no" in row:
        return f"{family}: no: {row['no']}"
    runs = ", ".join(f"{name} {_run_words(run)}" for name, run in row["recipes"].items())
    return (
        f"{family}: {row['kinds']} kinds, {row['groups']} groups, {row['folds']} folds; {runs}; "
        f"served {words(row['served'])}; {row['seconds']} s"
    )


def _table(rows: dict[str, Any]) -> str:
    head = ["family", "kinds", "groups", "folds", *(f"{name}: walk, reloaded" for name in RECIPES), "served"]
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    notes: list[str] = []
    for family, row in rows.items():
        cells = [row] if "no" in row else [*row["recipes"].values(), row["served"]]
        cut = [_noted(cell, notes) if "no" in cell else "" for cell in cells]
        if "no" in row:
            lines.append(f"{family} | {cut[0]}" + " |" * (len(head) - 2))
            continue
        runs = [
            text or f"{run['walk']:.4f}, {run['reloaded']:.4f}"
            for text, run in zip(cut[:-1], cells[:-1], strict=True)
        ]
        counts = [str(row[key]) for key in ("kinds", "groups", "folds")]
        lines.append(" | ".join([family, *counts, *runs, cut[-1] or words(row["served"])]))
    table = "\n".join(f"| {line} |" for line in lines)
    return table + "\n\n" + "\n".join(f"{number}. {note}" for number, note in enumerate(notes, 1))


def _noted(cell: dict[str, Any], notes: list[str]) -> str:
    """A cell that says no, with the number of the note that quotes why."""
    if cell["no"] not in notes:
        notes.append(cell["no"])
    return f"no ({notes.index(cell['no']) + 1})"


def _run_words(run: dict[str, Any]) -> str:
    return f"no: {run['no'][:160]}" if "no" in run else f"{run['walk']:.4f} = {run['reloaded']:.4f}"


def _family(family: str) -> dict[str, Any]:
    """Find, quantize and reload one family."""
    from lowbit_quantize.model.discovery.found import open_model
    from lowbit_quantize.model.reference import find_model

    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary) / family
        try:
            learned = _write(family, base)
        except Exception as error:  # what transformers cannot build
            return {"no": f"transformers: {type(error).__name__}: {' '.join(str(error).split())[:240]}"}
        try:
            reference, started = find_model(str(base)), time.monotonic()
            architecture, _ = open_model(reference)
        except Exception as error:
            return {"no": f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"}
        discovery_s = round(time.monotonic() - started, 1)
        kinds = list(dict.fromkeys(architecture.kinds))
        groups = [group for kind in kinds for group in kind.groups]
        found = {
            "kinds": len(kinds),
            "groups": len(groups),
            "folds": sum(group.fold is not None for group in groups),
            "dropped": [line for kind in kinds for line in kind.dropped],
            "tested": architecture.tested,
            "taught": learned,
            "discovery_s": discovery_s,
        }
        found["recipes"] = {name: _quantized(base, name) for name in RECIPES}
        found["served"] = _served(base, routed=any(kind.experts for kind in kinds))
    return {**found, "seconds": round(time.monotonic() - began, 1)}


def _write(family: str, directory: Path) -> bool:
    """A tiny model with uneven weights that was taught sentences, and a tokenizer; False where it did not learn."""
    import torch
    from tests.quantize.tiny_families import TOWER, _sized
    from tests.tiny_models import SENTENCES, VOCABULARY, taught, tiny_tokenizer
    from transformers import AutoConfig

    from lowbit_quantize.model.discovery.narrow import narrowed
    from lowbit_quantize.model.skeleton import model_class

    shallow = _shallow(AutoConfig.for_model(family, **SIZES.get(family, {})))
    config = narrowed(shallow)
    text = config.get_text_config()
    for name in AS_WIDE.get(family, ()):
        setattr(text, name, text.hidden_size)
    if text is not config:
        config.vision_config = _sized(config.vision_config, TOWER | {"out_hidden_size": text.hidden_size})
    text.vocab_size = VOCABULARY
    if getattr(text, "mamba_num_heads", None):  # its CPU kernel for 4 bits takes outputs in multiples of 32
        text.mamba_num_heads = 32
    if getattr(shallow.get_text_config(), "num_experts_per_tok", None) == 1:
        text.num_experts_per_tok = 1  # as before: what multiplies inputs is not added up
    if getattr(text, "vocab_size_per_layer_input", None):
        text.vocab_size_per_layer_input = VOCABULARY
    for key in KEPT_WIDE:
        if getattr(text, key, None) is not None:
            setattr(text, key, getattr(shallow.get_text_config(), key))
    torch.manual_seed(0)
    model = model_class(config)._from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                uneven = torch.exp(0.3 * torch.randn(1, parameter.shape[-1])).to(parameter.dtype)
                parameter.copy_(torch.randn(parameter.shape).to(parameter.dtype) * uneven * 0.08)
            elif "norm" in name and name.endswith("weight"):
                zero_centred = bool((parameter == 0).all())
                parameter.copy_(torch.exp(0.5 * torch.randn(parameter.shape)) - float(zero_centred))
    try:
        model, learned = taught(model.float(), SENTENCES).to(torch.bfloat16), True
    except (AssertionError, RuntimeError):  # it did not learn, or cannot be trained here
        model, learned = model.to(torch.bfloat16), False
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return learned


def _shallow(config: Any) -> Any:
    """As few layers as show every kind, in the configuration's own order."""
    from lowbit_quantize.model.discovery.narrow import narrowed
    from lowbit_quantize.model.discovery.twin import first_of_kinds
    from lowbit_quantize.model.skeleton import build_skeleton

    text = config.get_text_config()
    depth = text.num_hidden_layers
    skeleton = build_skeleton(narrowed(config))
    lists: Any = next(m for m in skeleton.modules() if type(m).__name__ == "ModuleList" and len(m) == depth)
    least = max(2, max(first_of_kinds(list(lists))) + 1)
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == depth:
            setattr(text, name, value[:least])
    text.num_hidden_layers = least
    return config


def _quantized(base: Path, name: str) -> dict[str, Any]:
    """The walk's mean KL, and the reloaded checkpoint's."""
    import torch
    from tests.quantize.small_runs import PLAIN_EXPERTS, heldout_ids, mean_kld, recipe_with

    from lowbit_core.errors import LowbitError, RecipeError
    from lowbit_evaluate.loaded_model import load_model
    from lowbit_quantize.model.reference import find_model
    from lowbit_quantize.pipeline import quantize

    every, out = {"match": "*", **RECIPES[name]}, base.parent / name
    recipe = recipe_with(every)
    try:
        try:
            walk = quantize(str(base), recipe, out, torch.device("cpu")).quality.mean_kld
        except RecipeError as error:
            if STACKS_ONLY not in str(error):
                raise
            recipe = recipe_with(every, PLAIN_EXPERTS)  # all but the experts, then
            walk = quantize(str(base), recipe, out, torch.device("cpu")).quality.mean_kld
        models = (load_model(find_model(str(place)), torch.device("cpu")).model for place in (base, out))
        again = mean_kld(*models, heldout_ids(base, recipe))
    except LowbitError as error:
        return {"no": str(error)[:300]}
    except Exception as error:  # a fault of ours or of transformers: its class says which
        return {"no": f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"}
    return {"walk": walk, "reloaded": again, "equal": _equal(name, walk, again)}


def _equal(recipe: str, walk: float, again: float) -> bool:
    share = ROUNDED_SHARE if recipe == "W8A8" else EQUAL_SHARE
    return abs(walk - again) < max(EQUAL, share * walk)


def _served(base: Path, *, routed: bool) -> dict[str, Any]:
    import torch
    from tests.quantize.small_runs import PLAIN_EXPERTS, recipe_with

    from lowbit_core.errors import LowbitError
    from lowbit_quantize.pipeline import quantize

    out = base.parent / "served"
    recipe = recipe_with({"match": "*", **SERVED}, *[PLAIN_EXPERTS] * routed)
    try:
        quantize(str(base), recipe, out, torch.device("cpu"))
    except LowbitError as error:
        return {"no": str(error)[:300]}
    except Exception as error:
        return {"no": f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"}
    found = served(out)
    if "no" not in found and found["equal"] < found["clear"]:
        found["base"] = served(base)  # as it is: what the engine makes of the family itself
    return found


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())

"""Our packing of integers in words, held against compressed-tensors 0.20, and a small file that this release packs.

    python benchmarks/formats/dense_packing.py --packages DIR [--json benchmarks/formats/results/dense_packing.json]
        [--file tests/quantize/numbers/dense_packing.safetensors]

DIR is where `pip install --target DIR --no-deps compressed-tensors==0.20.0` has put the library: it runs on this
environment's torch, in a process of its own, since the release that vLLM 0.32 pins packs otherwise. Codes and zero
points of 2 to 8 bits are packed by both and unpacked by each other, in shapes whose rows fill words and that do not;
whole linears that we stored are decompressed by its `PackedQuantizationCompressor`. `--file` gets codes, zero points
and what it packs of them, for a test without the library. Exits 1 where a number differs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks" / "quantizers")]
from provenance import hardware, versions  # noqa: E402

from lowbit_quantize.schemes.integer import Integer  # noqa: E402
from lowbit_quantize.schemes.scheme import Quantized  # noqa: E402
from lowbit_quantize.schemes.storage.packed_words import pack, unpack  # noqa: E402

BITS = range(2, 9)
SHAPES = ((8, 96), (33, 64), (40, 100), (5, 31), (64, 576))
LINEAR = (64, 192)
GROUP = 32
PROGRAM = """
import sys, torch
from safetensors.torch import load_file, save_file
import compressed_tensors
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
assert compressed_tensors.__version__.startswith("0.20."), compressed_tensors.__version__
given, found = load_file(sys.argv[1]), {}
for name, value in given.items():
    kind, bits, rest = name.split("/", 2)
    if kind == "codes":
        found[name.replace("codes", "words")] = pack_to_int32(value, int(bits)).contiguous()
    if kind == "zeros":
        found[name.replace("zeros", "zero_words")] = pack_to_int32(value, int(bits), packed_dim=0).contiguous()
    if kind == "ours":
        shape = given[name.replace("ours", "codes")].shape
        found[name.replace("ours", "back")] = unpack_from_int32(value, int(bits), shape).contiguous()
linears = sorted({name.rsplit("/", 1)[0] for name in given if name.startswith("linear/")})
for linear in linears:
    parts = {name.rsplit("/", 1)[1]: value for name, value in given.items() if name.startswith(linear + "/")}
    weights = QuantizationArgs(
        num_bits=int(linear.split("/")[1]), type="int", strategy="group", group_size=int(sys.argv[3]),
        symmetric="weight_zero_point" not in parts,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format="pack-quantized")
    parts["weight_scale"] = parts["weight_scale"].float()
    codec = BaseCompressor.get_value_from_registry("pack-quantized")
    found[linear + "/weight"] = codec.decompress(parts, scheme)["weight"].float()
save_file(found, sys.argv[2])
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--packages", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--file", type=Path)
    arguments = parser.parse_args()
    given = _codes()
    weights = _linears(given)
    theirs = _by_library(given, arguments.packages)
    found = {str(bits): _differences(bits, given, theirs, weights) for bits in BITS}
    for bits, one in found.items():
        print(f"{bits} bits: {json.dumps(one)}")
    if arguments.file:
        save_file(_small(given, theirs), arguments.file)
    if arguments.json:
        facts = {"compressed-tensors": "0.20.0", "hardware": hardware(), "versions": versions(sys.executable)}
        arguments.json.write_text(json.dumps({**facts, "bits": found}, indent=1) + "\n")
    return 0 if all(one["different"] == 0 for one in found.values()) else 1


def _codes() -> dict[str, Tensor]:
    """Random codes and zero points, and our words of the codes."""
    generator, given = torch.Generator().manual_seed(0), {}
    for bits in BITS:
        lowest, above = -(1 << (bits - 1)), 1 << (bits - 1)
        for rows, columns in SHAPES:
            codes = torch.randint(lowest, above, (rows, columns), generator=generator).to(torch.int8)
            place = f"{bits}/{rows}x{columns}"
            given |= {f"codes/{place}": codes, f"ours/{place}": pack(codes, bits)}
            given[f"zeros/{place}"] = codes[:, :3].contiguous()
    return given


def _linears(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Linears as a scheme stores them, added to `given`; returns what they stand for."""
    generator, weights = torch.Generator().manual_seed(1), {}
    for bits in BITS:
        for symmetric in (True, False):
            scheme = Integer(bits, GROUP, symmetric, "any")
            weight = torch.randn(LINEAR, generator=generator)
            params = scheme.search(weight, None)
            one = Quantized(scheme.quantize(weight, params), params, scheme)
            name = f"linear/{bits}/{'symmetric' if symmetric else 'asymmetric'}"
            given |= {f"{name}/{part}": value.contiguous() for part, value in one.tensors().items()}
            weights[name] = one.dequantize()
    return weights


def _by_library(given: dict[str, Tensor], packages: Path) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as temporary:
        before, after = Path(temporary) / "given", Path(temporary) / "found"
        save_file(given, before)
        subprocess.run(
            [sys.executable, "-c", PROGRAM, before, after, str(GROUP)],
            check=True,
            env={"PYTHONPATH": str(packages)},
        )
        return load_file(after)


def _differences(
    bits: int, given: dict[str, Tensor], theirs: dict[str, Tensor], weights: dict[str, Tensor]
) -> dict[str, Any]:
    """Numbers that differ, of how many, and bytes a number."""
    pairs: list[tuple[Tensor, Tensor]] = []
    for rows, columns in SHAPES:
        place = f"{bits}/{rows}x{columns}"
        codes, zeros, words = (given[f"{kind}/{place}"] for kind in ("codes", "zeros", "ours"))
        pairs += [(words, theirs[f"words/{place}"]), (codes, theirs[f"back/{place}"])]
        pairs += [(codes, unpack(theirs[f"words/{place}"], bits, columns))]
        pairs += [(pack(zeros.T, bits).T, theirs[f"zero_words/{place}"])]
    linears = [name for name in weights if name.startswith(f"linear/{bits}/")]
    pairs += [(weights[name], theirs[f"{name}/weight"]) for name in linears]
    rows, columns = SHAPES[-1]
    return {
        "different": sum(int((ours != other).sum()) for ours, other in pairs),
        "compared": sum(ours.numel() for ours, _ in pairs),
        "bits_stored": 8 * given[f"ours/{bits}/{rows}x{columns}"].nbytes / (rows * columns),
    }


def _small(given: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Codes in a shape that fills no words, and what the library packs of them."""
    small = {}
    for bits in BITS:
        place = f"{bits}/{SHAPES[2][0]}x{SHAPES[2][1]}"
        small |= {name: given[name] for name in (f"codes/{place}", f"zeros/{place}")}
        small |= {name: theirs[name] for name in (f"words/{place}", f"zero_words/{place}")}
    return small


if __name__ == "__main__":
    raise SystemExit(main())

"""Schemes by budget against uniform ones and the rule of thumb, at equal bits, and predicted beside measured KL.

    python benchmarks/sensitivity/run.py --out benchmarks/sensitivity/results/demo.json

One `lowbit sensitivity` measures the base model; for each case a recipe is written (by `lowbit allocate`, or by the
rule that the case is), `lowbit quantize` makes the checkpoint, bare as in `quantizers/`, and `quantizers/kl.py` judges
it on both texts. CPU seconds are the kernel's for each process. A stopped script goes on where it was. Paths, texts and
the judge are those of `quantizers/`, beside which this lies. Standard library, but for PyYAML.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "quantizers"))

from cases import BARE, Scenario  # noqa: E402
from measurement import measured  # noqa: E402
from provenance import hardware, revision, sha256  # noqa: E402
from run import judged, prepared_model, prepared_tokens, thread_limits  # noqa: E402

REPOSITORY = HERE.parent.parent
W8A8 = "W8A8:smoothquant+gptq"
CANDIDATES = f"W3A16,W4A16,W5A16,W6A16,W8A16,{W8A8}"
INTEGERS = "W3A16,W4A16,W5A16,W6A16,W8A16"
SERVED = f"W4A16,{W8A8}"  # what vLLM serves on CPUs
Document = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A checkpoint: allocated under `bits` from `candidates`, or by a rule of its own (`schemes`)."""

    name: str
    candidates: str = ""
    bits: float = 0.0
    rule: str = ""
    corrected_by: tuple[str, ...] = ()


def everywhere(scheme: str) -> Callable[[str, int, int], str]:
    return lambda kind, layer, depth: scheme


def ends(low: str, high: str) -> Callable[[str, int, int], str]:
    """The rule of thumb: the first and the last two layers in the larger scheme."""
    return lambda kind, layer, depth: high if layer < 2 or layer >= depth - 2 else low


def every(step: int, low: str, high: str) -> Callable[[str, int, int], str]:
    """The larger scheme in every so many layers: a uniform mix of the same bits."""
    return lambda kind, layer, depth: high if layer % step == step // 2 else low


RULES = {
    "W4A16": everywhere("W4A16"),
    "W5A16": everywhere("W5A16"),
    "ends-W4A16-W8A8": ends("W4A16", W8A8),
    "ends-W4A16-W8A16": ends("W4A16", "W8A16"),
    "every-8th-W4A16-W8A8": every(8, "W4A16", W8A8),
    "every-2nd-W4A16-W5A16": every(2, "W4A16", "W5A16"),
}
CASES = (
    Case("integers-4.5", INTEGERS, 4.5, corrected_by=("uniform-4",)),
    Case("served-4.5", SERVED, 4.5, corrected_by=("uniform-4",)),
    Case("served-4.53", SERVED, 4.5334, corrected_by=("uniform-4",)),  # the bits of the next one
    Case("ends-8", rule="ends-W4A16-W8A8"),
    Case("uniform-4", rule="W4A16"),
    Case("uniform-4-5", rule="every-2nd-W4A16-W5A16"),
    Case("uniform-4-8", rule="every-8th-W4A16-W8A8"),
    Case("integers-5", INTEGERS, 5.0, corrected_by=("uniform-4",)),
    Case("integers-4.25", INTEGERS, 4.25, corrected_by=("uniform-4",)),
    Case("ends-8-integers", rule="ends-W4A16-W8A16"),
    Case("uniform-5", rule="W5A16"),
)


def by_rule(sensitivity: Document, rule: str) -> Document:
    """The modules of a recipe that a rule of `RULES` makes."""
    decisions = [one for one in sensitivity["decisions"] if one["modules"] and one["layer"] is not None]
    depth = 1 + max(one["layer"] for one in decisions)
    candidates = {one["name"]: one for one in sensitivity["candidates"]}
    names: dict[str, list[str]] = {}
    for one in decisions:
        scheme = RULES[rule](one["kind"], one["layer"], depth)
        names.setdefault(scheme, []).extend(one["modules"])
    keys = ("scheme", "group_size", "methods")
    rules = [
        {"match": modules, **{key: value for key in keys if (value := candidates[scheme][key])}}
        for scheme, modules in names.items()
    ]
    return {"modules": rules, "kv_cache": {"dtype": "none"}}


def summed(sensitivity: Document, recipe: Document) -> tuple[float, float, dict[str, int]]:
    """A recipe's predicted KL, its bits of a code, and how many decisions each scheme has."""
    names = {candidate["scheme"]: candidate["name"] for candidate in sensitivity["candidates"]}
    schemes = {name: names[rule["scheme"]] for rule in recipe["modules"] for name in rule["match"]}
    kl = bits = weights = 0.0
    counts: dict[str, int] = {}
    for one in sensitivity["decisions"]:
        if one["modules"] and one["modules"][0] in schemes:
            name = schemes[one["modules"][0]]
            choice = one["choices"][name]
            kl, bits = kl + choice["kl"], bits + choice["bits"] * one["weights"]
            weights += one["weights"]
            counts[name] = counts.get(name, 0) + 1
    return kl, bits / weights, counts


class Bench:
    """What all steps share, and the result as it grows."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.out: Path = arguments.out
        self.work: Path = arguments.work.resolve()
        (self.work / "out").mkdir(parents=True, exist_ok=True)
        self.python: Path = arguments.lowbit_python.absolute()
        self.threads: int = arguments.threads
        model = (arguments.model or prepared_model(self.python, self.work)).resolve()
        rows = {
            "calibration": arguments.rows,
            "heldout": arguments.heldout_rows,
            "unseen": arguments.heldout_rows,
        }
        self.model = model
        self.texts = {
            text: prepared_tokens(self.python, self.work, model, text, count) for text, count in rows.items()
        }
        self.tokens: int = arguments.tokens
        facts = {
            "hardware": hardware(),
            "scenario": {
                "model": model.name,
                "model_sha256": sha256(sorted(model.glob("*.safetensors"))),
                **{f"{text}_sha256": sha256([file]) for text, file in self.texts.items()},
                "rows": arguments.rows,
                "threads": self.threads,
                "sensitivity_tokens": self.tokens,
                "candidates": CANDIDATES,
            },
        }
        self.result: Document = {**facts, "costs": {}, "runs": []}
        if self.out.exists():
            found = json.loads(self.out.read_text(encoding="utf-8"))
            if any(found[key] != value for key, value in facts.items()):
                raise SystemExit(
                    f"{self.out} holds runs of another scenario or machine; choose another --out"
                )
            self.result = found

    def lowbit(self, *words: str | Path | int) -> list[str]:
        """A command line of Lowbit."""
        return [str(self.python.parent / "lowbit"), *map(str, words)]

    def counted(self, name: str, line: Sequence[str]) -> Document:
        """Run a command that writes `out/NAME`, and count it."""
        print(f"{datetime.datetime.now():%H:%M} {name}", file=sys.stderr, flush=True)
        out = self.work / "out" / name
        done = asdict(measured(name, line, thread_limits(self.threads), out))
        done["cpu_s"] = round(done["user_s"] + done["system_s"], 1)
        return done

    def save(self) -> None:
        self.out.write_text(json.dumps(self.result, indent=1) + "\n", encoding="utf-8")

    def measure(self, name: str, candidates: str) -> None:
        """Sensitivities, once, and their CPU seconds."""
        if name in self.result["costs"] and self.file(name).exists():
            return
        text = ("--set", f"calibration.token_ids={self.texts['calibration']}")
        line = self.lowbit(
            "sensitivity", self.model, "--recipe", "gptq-g64", "--candidates", candidates, "--tokens", self.tokens,
            *text, "--out", self.file(name),
        )  # fmt: skip
        self.result["costs"][name] = self.counted(name, line)
        self.save()

    def gptq(self) -> None:
        """A GPTQ run of as many tokens, to hold the CPU seconds of sensitivities against."""
        if "gptq" not in self.result["costs"]:
            rows = json.loads(self.texts["calibration"].read_text(encoding="utf-8"))["input_ids"]
            few = self.work / f"{self.tokens}-tokens.json"
            few.write_text(json.dumps({"input_ids": rows[: self.tokens // len(rows[0])]}), encoding="utf-8")
            self.result["costs"]["gptq"] = self.quantized("gptq-few", "gptq-g64", few)
            self.save()

    def file(self, name: str) -> Path:
        """A sensitivity document."""
        return self.work / f"{name}.json"

    def quantized(self, name: str, recipe: str | Path, calibration: Path | None = None) -> Document:
        """Make the checkpoint `out/NAME`."""
        calibration = calibration or self.texts["calibration"]
        settings = (f"calibration.token_ids={calibration}", *BARE)
        flags = [word for setting in settings for word in ("--set", setting)]
        out = ("--out", self.work / "out" / name)
        return self.counted(
            name, self.lowbit("quantize", "--model", self.model, "--recipe", recipe, *out, *flags)
        )

    def take_peers(self, file: Path) -> None:
        """Take what a peer's own allocation gave on the same texts, out of a result of `quantizers/run.py`."""
        found = json.loads(file.read_text(encoding="utf-8"))
        theirs, ours = found["scenario"], self.result["scenario"]
        texts = {"token_ids_sha256": "calibration_sha256"}
        for key in ("model_sha256", "token_ids_sha256", "heldout_sha256", "unseen_sha256"):
            if theirs[key] != ours[texts.get(key, key)]:
                raise SystemExit(f"{file} is of another {key.removesuffix('_sha256')} than {self.out}")
        self.result["peers"] = [run for run in found["runs"] if "auto_scheme" in run["case"]["settings"]]
        self.save()

    def recipe(self, case: Case) -> Path:
        """The recipe of a case."""
        file = self.work / f"{case.name}.yaml"
        file.unlink(missing_ok=True)
        if case.rule:
            document = json.loads(self.file("sensitivity").read_text(encoding="utf-8"))
            file.write_text(yaml.safe_dump(by_rule(document, case.rule)), encoding="utf-8")
            return file
        words = ["allocate", self.file("sensitivity"), "--bits", case.bits, "--candidates", case.candidates]
        log = self.work / f"{case.name}-allocate.log"
        with log.open("wb") as stderr:
            subprocess.run(
                self.lowbit(*words, "--out", file), check=True, stdout=subprocess.DEVNULL, stderr=stderr,
                env=thread_limits(self.threads),
            )  # fmt: skip
        return file

    def one_run(self, case: Case) -> Document:
        """Make and judge the checkpoint of a case."""
        recipe = self.recipe(case)
        document = json.loads(self.file("sensitivity").read_text(encoding="utf-8"))
        kl, bits, counts = summed(document, yaml.safe_load(recipe.read_text(encoding="utf-8")))
        measurement = self.quantized(case.name, recipe)
        checkpoint = self.work / "out" / case.name
        digest = sha256(sorted(checkpoint.glob("*.safetensors")))
        return {
            "name": case.name,
            "case": asdict(case),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "git_revision": revision(REPOSITORY),
            "bits": round(bits, 4),
            "decisions": counts,
            "predicted_kl_raw": kl,
            **measurement,
            "quality": self.judged("heldout", checkpoint, digest),
            "unseen": self.judged("unseen", checkpoint, digest),
        }

    def judged(self, text: str, checkpoint: Path, digest: str) -> Document:
        scenario = Scenario(
            self.model,
            self.texts["calibration"],
            self.texts["heldout"],
            self.texts["unseen"],
            4,
            64,
            self.threads,
        )
        return judged(
            self.python, scenario, "unseen" if text == "unseen" else "quality", checkpoint, digest, []
        )


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [case.name for case in CASES]
    parser.add_argument("--work", type=Path, default=Path(".bench"), help="models, texts and outputs")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the result")
    parser.add_argument(
        "--only", nargs="*", choices=names, default=names, metavar="CASE", help=", ".join(names)
    )
    parser.add_argument("--model", type=Path, help="base model directory; default SmolLM2-135M-Instruct")
    parser.add_argument("--rows", type=int, default=32, help="calibration rows of 512 tokens")
    parser.add_argument(
        "--heldout-rows", type=int, default=40, help="rows of 512 to judge on, of either text"
    )
    parser.add_argument("--tokens", type=int, default=4096, help="of lowbit sensitivity")
    parser.add_argument(
        "--peers", type=Path, help="a result of quantizers/run.py that has AutoScheme's cases"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--lowbit-python", type=Path, default=Path(sys.executable), help="an environment with Lowbit"
    )
    return parser.parse_args()


def main() -> None:
    arguments = options()
    bench = Bench(arguments)
    bench.measure("sensitivity", CANDIDATES)
    for case in CASES:
        if case.name in arguments.only and all(run["name"] != case.name for run in bench.result["runs"]):
            run = bench.one_run(case)
            bench.result["runs"].append(run)
            bench.save()
            kl = " and ".join(f"{run[text]['mean_kl_nats']:.4f}" for text in ("quality", "unseen"))
            print(
                f"{case.name}: {run['bits']:.3f} bits, predicted {run['predicted_kl_raw']:.4f}, KL {kl} unseen",
                flush=True,
            )
    bench.measure("sensitivity-served", SERVED)
    bench.gptq()
    if arguments.peers:
        bench.take_peers(arguments.peers)


if __name__ == "__main__":
    main()

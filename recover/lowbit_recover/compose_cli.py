"""`lowbit compose`: several runs of quantize and distill as one; the last line of stdout is JSON."""

import argparse
import json
import os
import sys

from lowbit_core.cli import Command, file_path
from lowbit_core.errors import ConfigError, QualityError


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("steps", metavar="STEPS.yaml", type=file_path, help="the steps (docs/recovery.md)")
    parser.add_argument("--model", required=True, metavar="MODEL", help="as --model of lowbit quantize")
    parser.add_argument(
        "--out",
        required=True,
        type=file_path,
        metavar="DIR",
        help="new or empty; each step is a folder there",
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--trust-remote-code", action="store_true", help="as of lowbit quantize")


def _run(arguments: argparse.Namespace) -> int:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch loads: idle threads sleep, not spin
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        from lowbit_quantize.device.chosen import chosen_device
    except ImportError:
        raise ConfigError(
            "`lowbit compose` needs torch and transformers; run `pip install 'lowbit[cpu]'` or [gpu]"
        ) from None
    from lowbit_recover.compose.compose import compose
    from lowbit_recover.compose.steps_file import load_steps

    steps, device = load_steps(arguments.steps), chosen_device(arguments.device)
    manifest, place = compose(
        arguments.model, steps, arguments.out, device, trust_remote_code=arguments.trust_remote_code
    )
    found = [
        one.model_dump(include={"step", "what", "mean_kld", "kld_stderr", "bytes", "seconds", "cpu_seconds"})
        for one in manifest.steps
    ]
    result = {"checkpoint": str(place), "accepted": manifest.gate.accepted, "steps": found}
    sys.stdout.write(json.dumps(result) + "\n")
    if not manifest.gate.accepted:
        sys.stderr.write(f"lowbit: rejected by its quality gate: {'; '.join(manifest.gate.reasons)}\n")
        return QualityError.exit_status
    return 0


command = Command(
    "Prune, recover, quantize, recover: several steps in one run that resumes.", _add_arguments, _run
)

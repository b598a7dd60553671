"""`lowbit export`: a finished checkpoint in another format; one JSON object as the last line of stdout."""

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from lowbit_core.cli import Command, file_path
from lowbit_core.errors import ConfigError


@dataclass(frozen=True)
class Target:
    """A row of the table: the class, as module:name below this package, and the flags that go with it alone.

    A flag maps to what argparse takes of it, and its value goes to the class under its name where it is given.
    `uploads`: it writes nothing here, and so takes no --out.
    """

    place: str
    flags: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    uploads: bool = False

    def load(self) -> Any:
        """The class; torch loads only now, when a checkpoint is exported."""
        module, name = self.place.split(":")
        return getattr(import_module(f"lowbit_quantize.export.{module}"), name)


REST = {
    "choices": ("f16", "bf16", "q8_0"),
    "help": "what matrices are stored as that are not quantized (default f16)",
}
SPLIT = {
    "type": float,
    "metavar": "GB",
    "help": "a directory of files that are each no larger (default: one file)",
}
MODEL_NAME = {"metavar": "NAME", "help": "the model's name in the repository (default: the base model's)"}
MOUNT = {
    "metavar": "PATH",
    "help": "the repository's absolute path where Triton runs (default: paths for a server that is started in it)",
}
REPO = {"metavar": "OWNER/NAME", "help": "the repository on the hub, made where there is none"}
PRIVATE = {"action": "store_true", "help": "a repository that is made is private"}
FORMAT = {"choices": ("nf4", "int8"), "help": "4 bits or 8 (default nf4)"}
BASE = {
    "metavar": "MODEL",
    "help": "where the base model is (default: where it came from, if that is the hub)",
}
ACTIVATIONS = {
    "choices": ("float32", "int8"),
    "help": "what products compute with: int8 is faster and not what was proven (default float32)",
}
TARGETS = {
    "autoawq": Target("autoawq:AutoAwq"),
    "autogptq": Target("autogptq:AutoGptq"),
    "bitsandbytes": Target("bitsandbytes:BitsAndBytes", {"--format": FORMAT, "--base": BASE}),
    "gguf": Target("gguf.target:Gguf", {"--rest": REST, "--split-max-size": SPLIT}),
    "hub": Target("hub:Hub", {"--repo": REPO, "--private": PRIVATE}, uploads=True),
    "mlx": Target("mlx:Mlx"),
    "modelopt": Target("modelopt:ModelOpt"),
    "onnx": Target("onnx:Onnx", {"--activations": ACTIVATIONS}),
    "openvino": Target("openvino:OpenVino"),
    "triton": Target("triton:Triton", {"--model-name": MODEL_NAME, "--mount": MOUNT}),
}


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", type=file_path, metavar="DIR", help="a checkpoint that `lowbit quantize` wrote"
    )
    parser.add_argument("--to", required=True, choices=tuple(TARGETS), help="the format")
    parser.add_argument(
        "--out",
        type=file_path,
        metavar="PATH",
        help="a directory, new or empty; a new file for gguf in one; none for hub",
    )
    for flag, (targets, settings) in _own_flags().items():
        text = f"with --to {' or '.join(targets)}: {settings['help']}"
        parser.add_argument(flag, **{**settings, "help": text, "default": None})


def _own_flags() -> dict[str, tuple[list[str], Mapping[str, Any]]]:
    """The targets that each flag goes with, and what argparse takes of it."""
    found: dict[str, tuple[list[str], Mapping[str, Any]]] = {}
    for name, target in TARGETS.items():
        for flag, settings in target.flags.items():
            found.setdefault(flag, ([], settings))[0].append(name)
    return found


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The flags that are the target's own, by name; raises ConfigError for one of another target."""
    found = {}
    for flag, (targets, _) in _own_flags().items():
        name = flag.lstrip("-").replace("-", "_")
        value = getattr(arguments, name)
        if value is not None and arguments.to not in targets:
            raise ConfigError(
                f"{flag} goes with --to {' or '.join(targets)}, not {arguments.to}; leave it out"
            )
        if value is not None:
            found[name] = value
    return found


def _run(arguments: argparse.Namespace) -> int:
    target, given = TARGETS[arguments.to], _given(arguments)
    if target.uploads == (arguments.out is not None):
        raise ConfigError(
            f"--out is where files are written, and --to {arguments.to} "
            + (
                "writes none; leave it out"
                if target.uploads
                else "needs it; give a directory or file that is new"
            )
        )
    made = target.load()(**given)
    result = made.upload(arguments.checkpoint) if target.uploads else _write(arguments, made)
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


def _write(arguments: argparse.Namespace, exporter: Any) -> dict[str, Any]:
    from lowbit_quantize.export.exporter import export

    manifest = export(arguments.checkpoint, exporter, arguments.out)
    assert manifest.export is not None
    return {
        "checkpoint": str(arguments.out),
        **manifest.export.model_dump(),
        "readers": exporter.readers,
        "bytes": manifest.size.bytes,
        "linear_bits_per_weight": manifest.size.linear_bits_per_weight,
    }


command = Command("Write a checkpoint in a format that other tools read.", _add_arguments, _run)

"""`lowbit export`: a finished checkpoint in another format; one JSON object as the last line of stdout."""

import argparse
import json
import sys

from lowbit_core.cli import Command, file_path
from lowbit_core.errors import ConfigError

TARGETS = ("autoawq", "autogptq", "gguf", "modelopt")
REST = ("f16", "bf16", "q8_0")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", type=file_path, metavar="DIR", help="a checkpoint that `lowbit quantize` wrote"
    )
    parser.add_argument("--to", required=True, choices=TARGETS, help="the format")
    parser.add_argument(
        "--out",
        required=True,
        type=file_path,
        metavar="PATH",
        help="a directory, new or empty; a new file for gguf",
    )
    parser.add_argument(
        "--rest",
        choices=REST,
        help="with --to gguf: what matrices are stored as that are not quantized (default f16)",
    )


def _run(arguments: argparse.Namespace) -> int:
    from lowbit_quantize.export.autoawq import AutoAwq  # torch loads only when a checkpoint is exported
    from lowbit_quantize.export.autogptq import AutoGptq
    from lowbit_quantize.export.exporter import Exporter, export
    from lowbit_quantize.export.gguf.target import Gguf
    from lowbit_quantize.export.modelopt import ModelOpt

    if arguments.rest and arguments.to != Gguf.name:
        raise ConfigError(
            f"--rest goes with --to {Gguf.name}; {arguments.to} keeps what is not quantized as it is"
        )
    exporters: tuple[Exporter, ...] = (AutoAwq(), AutoGptq(), Gguf(arguments.rest or REST[0]), ModelOpt())
    exporter = next(one for one in exporters if one.name == arguments.to)
    manifest = export(arguments.checkpoint, exporter, arguments.out)
    assert manifest.export is not None
    result = {
        "checkpoint": str(arguments.out),
        **manifest.export.model_dump(),
        "readers": exporter.readers,
        "bytes": manifest.size.bytes,
        "linear_bits_per_weight": manifest.size.linear_bits_per_weight,
    }
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


command = Command("Write a checkpoint in a format that other tools read.", _add_arguments, _run)

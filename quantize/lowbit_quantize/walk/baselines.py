"""What measured quality is held against: the base model in float32, and with an FP8 cache and nothing else.

Two more streams walk beside the base model's, on a few held-out sequences:

- **The noise floor** is the base model in the serving dtype against itself in float32, from the same weights. It is
  what arithmetic alone does: two correct engines differ by up to about twice as much, and no checkpoint that is as
  close to its base as that can be told from it.
- **The FP8 cache alone** is the base model whose keys and values are rounded with the checkpoint's scales (with those
  that its own values would have had, where an AWQ scale was folded into the value projection).

Float32 layers cost several times what the others do, hence so few sequences. A layer is loaded for each stream by
itself: one copy in float32 is in memory, as large as two.
"""

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lowbit_core.manifest import DivergenceRecord
from lowbit_quantize.model.decoder import Decoder
from lowbit_quantize.quality.dataset import TokenText
from lowbit_quantize.quality.kl import compare, divergence
from lowbit_quantize.run.hidden_states import HiddenStates
from lowbit_quantize.schemes.kv_cache import KVScales
from lowbit_quantize.walk.visit import Traveller

FLOAT32, FP8_CACHE = "heldout_float32", "heldout_fp8_cache"
SEQUENCES = {FLOAT32: 4, FP8_CACHE: 8}  # at most


def baseline_sequences(domains: Sequence[str], *, fp8_cache: bool) -> dict[str, list[int]]:
    """The streams, and the numbers of the held-out sequences in each, rising: domains take turns."""
    turns = sorted((domains[:number].count(domain), number) for number, domain in enumerate(domains))
    names = [FLOAT32] + [FP8_CACHE] * fp8_cache
    return {name: sorted(number for _, number in turns[: SEQUENCES[name]]) for name in names}


class Baselines:
    """The streams of one walk, by name; without `rows` nothing happens."""

    def __init__(
        self, decoder: Decoder, streams: HiddenStates, text: TokenText, rows: Mapping[str, list[int]]
    ) -> None:
        self._decoder, self._streams, self._ids, self._rows = decoder, streams, text.ids, rows

    def embed(self) -> None:
        """Make the streams."""
        for name, rows in self._rows.items():
            dtype = torch.float32 if name == FLOAT32 else self._decoder.dtype
            shape = len(rows), self._ids.shape[1], self._decoder.width
            self._decoder.embed(self._ids[rows], self._streams.new(name, shape, dtype))

    @property
    def hidden(self) -> list[Tensor]:
        """All the streams."""
        return [self._streams[name] for name in self._rows]

    def in_float32(self, index: int) -> list[Traveller]:
        """The float32 stream on its way through a layer, where there is one."""
        if FLOAT32 not in self._rows:
            return []
        return [Traveller(self._streams[FLOAT32], self._decoder.load_frame(index).float())]

    def with_fp8_cache(self, base: Callable[[], nn.Module], scales: KVScales | None) -> list[Traveller]:
        """The stream with the FP8 cache on its way through the base model's layer, where there is one."""
        return [Traveller(self._streams[FP8_CACHE], base(), scales)] if FP8_CACHE in self._rows else []

    def measure(self, base: Tensor, norm: nn.Module, head: Tensor) -> dict[str, DivergenceRecord]:
        """Noise floor and FP8 cache alone, by their names in the manifest; `base` is what the final norm reads."""
        found, form = {}, self._decoder.architecture.logits
        if rows := self._rows.get(FLOAT32):
            exact, wide = self._decoder.finished(self._streams[FLOAT32]), copy.deepcopy(norm).float()
            found["noise_floor"] = compare(exact, base[rows], wide, norm, head, self._ids[rows], form=form)
        if rows := self._rows.get(FP8_CACHE):
            rounded = self._decoder.finished(self._streams[FP8_CACHE])
            found["kv_cache_alone"] = compare(
                base[rows], rounded, norm, norm, head, self._ids[rows], form=form
            )
        return {name: divergence(predictions) for name, predictions in found.items()}

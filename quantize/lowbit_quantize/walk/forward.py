"""One walk down the decoder: the streams are held here and move one layer at a time; each finished layer is recorded.

Two streams of hidden states walk: the base model's, on text that judges, and the compressed model's, on that and on
calibration text. The held-out text judges, and what is set aside of the calibration text. Each layer is observed on
what the compressed layers before it really give. Where weights make up for earlier errors, the base model's
calibration text walks too (stages.py), and for the noise floor some of its held-out text in float32 (baselines.py).
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from lowbit_core.errors import NumericsError
from lowbit_core.log import get_logger
from lowbit_core.manifest import DivergenceRecord, KVLayerRecord, QualityRecord
from lowbit_core.progress import track
from lowbit_quantize.device import ranks
from lowbit_quantize.device.memory import keep_freed_memory, keep_no_freed_memory, return_freed_memory
from lowbit_quantize.model.architecture import LayerKind, kind_of
from lowbit_quantize.model.decoder import Decoder
from lowbit_quantize.model.discovery.hold import drop_broken_folds
from lowbit_quantize.model.files.published_names import PublishedNames
from lowbit_quantize.model.weights import is_finite
from lowbit_quantize.quality import kl
from lowbit_quantize.quality.dataset import TokenText, judging_ids
from lowbit_quantize.run.clock import BASE, BASELINES, COMPARE, COMPRESSED, EXPERTS, PREPARE, WRITE, Clock
from lowbit_quantize.run.hidden_states import HiddenStates
from lowbit_quantize.run.journal import Conclusion, HeadRecord, Journal, LayerRecord, UnopenedLinear
from lowbit_quantize.run.writer import CheckpointWriter
from lowbit_quantize.schemes.storage.stored_linears import reader_of
from lowbit_quantize.walk.baselines import Baselines
from lowbit_quantize.walk.dropped import DroppedLayers
from lowbit_quantize.walk.head import QuantizedHead, quantize_head
from lowbit_quantize.walk.layer import LayerContext, LayerResult, Pass, QuantizedLinear
from lowbit_quantize.walk.layer_writer import LayerWriter, beside, kv_tensors, record_of
from lowbit_quantize.walk.module_plan import ModulePlan, Modules
from lowbit_quantize.walk.visit import Traveller, experts_of, visit

log = get_logger("quantize")

PARTS = 6  # that a tensor of a layer may be stored in, at most


@dataclass(frozen=True)
class Work:
    """What a walk does: the table, the passes in order, whether the base model's calibration text walks too, the layers
    with an FP8 cache, the held-out sequences of each baseline, and whether a scale of the head's inputs may fold into
    the final norm. `names` are those of what is served, where its sizes are not those of what walks; `dropped` are the
    base's layers that do not walk. `compensates`: methods aim at the base model's calibration text where it walks.
    """

    modules: Modules
    passes: tuple[Pass, ...]
    paired: bool
    fp8_layers: frozenset[int]
    baselines: Mapping[str, list[int]]
    fold_head: bool = True
    scales_by_head: bool = False
    names: PublishedNames | None = None
    dropped: DroppedLayers | None = None
    compensates: bool = True


@dataclass(frozen=True)
class MadeExpert:
    """What becomes of a routed expert: tensors beside its quantized linears, and how many tokens it saw if too few."""

    number: int
    beside: dict[str, Tensor]
    linears: dict[str, QuantizedLinear]
    under_calibrated: int | None


class Walk:
    """The streams of one walk and what its finished layers left."""

    def __init__(
        self,
        decoder: Decoder,
        work: Work,
        texts: tuple[TokenText, TokenText],
        writer: CheckpointWriter,
        journal: Journal,
        stream_memory_bytes: int,
        clock: Clock,
    ) -> None:
        self.decoder, self.work, self.writer, self.journal = decoder, work, writer, journal
        self._clock = clock
        self._calibration_text, self._heldout_text = texts
        self._judging = judging_ids(*texts)
        self._streams = HiddenStates(decoder.device, journal.directory, stream_memory_bytes)
        self._held: set[LayerKind] = set()
        self._baselines = Baselines(decoder, self._streams, self._heldout_text, work.baselines)

    @property
    def layers(self) -> Sequence[LayerRecord]:
        """What is recorded of each finished layer."""
        return self.journal.layers

    @property
    def unopened(self) -> dict[str, UnopenedLinear]:
        """What was noted of each linear that plain transformers does not open."""
        found = {name: one for record in self.layers for name, one in record.unopened.items()}
        if self.head is not None and self.head.unopened is not None:
            found[self.head.module.name] = self.head.unopened
        return found

    def run(self) -> None:
        """Walk every layer that is not finished and write its shard."""
        self._clock.begin(PREPARE)
        finished = self._take_up()
        if not finished:
            self._embed()
        depth = self.decoder.depth
        keep_freed_memory()
        indices = range(finished, depth)
        for index in track(indices, depth, "layers", done=finished) if ranks.is_first() else indices:
            self._step(index)
            self._streams.release()
            return_freed_memory()

    def _embed(self) -> None:
        calibrating = self._calibration_text.ids
        texts = {"calibration": calibrating, "heldout": self._judging, "heldout_base": self._judging}
        if self.work.paired:
            texts["calibration_base"] = calibrating
        for name, ids in texts.items():
            shape = (*ids.shape, self.decoder.width)
            self.decoder.embed(ids, self._streams.new(name, shape, self.decoder.dtype))
        self._baselines.embed()

    def _take_up(self) -> int:
        """Restore what an earlier process has finished; returns the number of layers."""
        ranks.by_first(lambda: self.journal.begin(self.writer.directory))
        self.writer.adopt(self.journal.shards)
        if self.journal.layers and not self.journal.conclusion:
            self.journal.load_streams(self._streams)
            log.info("going on after %d of %d layers", len(self.journal.layers), self.decoder.depth)
        return len(self.journal.layers)

    def _step(self, index: int) -> None:
        self._pass_dropped(index)
        self._hold_folds(index)
        if self.decoder.architecture.kinds[index].experts:
            self._visit(index)
        else:
            self._pass_through(index)

    def _pass_dropped(self, place: int) -> None:
        """Take the base's streams through what stood before a layer, or behind the last one."""
        if self.work.dropped is None:
            return
        self._clock.begin(BASE)
        paired = ["calibration_base"] if self.work.paired else []
        streams = [self._streams[name] for name in ("heldout_base", *paired)]
        self.work.dropped.take(place, [*streams, *self._baselines.hidden])

    def _pass_through(self, index: int) -> None:
        """A layer without routed experts: one copy of it at a time for each stream."""
        decoder, streams, clock = self.decoder, self._streams, self._clock
        clock.begin(BASELINES)
        for one in self._baselines.in_float32(index):
            decoder.advance(one.layer, index, one.hidden)
        clock.begin(BASE)
        layer = decoder.load_layer(index)
        decoder.advance(layer, index, streams["heldout_base"])
        self._check_base(index)
        context = self._run_passes(layer, index)
        result = context.result
        clock.begin(COMPRESSED)
        decoder.advance(layer, index, streams["heldout"], result.hook)
        clock.begin(BASELINES)
        for one in self._baselines.with_fp8_cache(lambda: decoder.load_layer(index), result.base_hook):
            decoder.advance(one.layer, index, one.hidden, one.hook)
        written = self._layer_writer(index)
        self._finish(layer, index, result, written)

    def _visit(self, index: int) -> None:
        """A layer with routed experts: what is around them in as many copies as streams need, the experts once."""
        decoder, streams, clock = self.decoder, self._streams, self._clock
        clock.begin(BASE)
        layer, base = decoder.load_frame(index), decoder.load_frame(index)
        context, written = self._run_passes(layer, index), self._layer_writer(index)
        clock.begin(EXPERTS)
        result, prefix, work = context.result, f"{kind_of(layer).experts}.", context.expert_work
        calibration = Traveller(
            context.calibration, layer, result.hook,
            compressed=True, halfway=context.halfway, read_on=context.read_on,
        )  # fmt: skip
        travellers = [
            Traveller(streams["heldout_base"], base),
            Traveller(streams["heldout"], layer, result.hook, compressed=True),
            *self._baselines.in_float32(index),
            *self._baselines.with_fp8_cache(lambda: base, result.base_hook),
        ]
        if context.read_on or work:
            travellers.append(calibration)
        if context.calibration_base is not None and context.read_on:
            travellers.append(
                Traveller(context.calibration_base, base, halfway=context.halfway and context.compensates)
            )

        def make(experts: Mapping[int, nn.Module]) -> list[MadeExpert]:
            found = work(list(experts), calibration.called) if work else {}
            made = []
            for number, expert in experts.items():
                name = f"{prefix}{number}."
                done = {one: linear for one, linear in result.linears.items() if one.startswith(name)}
                linears, seen = found.get(number, done), result.under_calibrated.get(number)
                made.append(MadeExpert(number, beside(expert, linears, name), linears, seen))
            return made

        def keep(made: list[MadeExpert]) -> None:
            for one in made:
                if written:
                    written.add(one.beside, one.linears)
                for name in one.linears:
                    result.linears.pop(name, None)
                if one.under_calibrated is not None:
                    result.under_calibrated[one.number] = one.under_calibrated

        visit(decoder, index, travellers, experts_of(layer), make, keep, work.together if work else 1)
        self._check_base(index)
        self._finish(layer, index, result, written)

    def _run_passes(self, layer: nn.Module, index: int) -> LayerContext:
        context = self._context(index)
        for number, one in enumerate(self.work.passes, 1):
            self._clock.begin(one.name)
            context.last = number == len(self.work.passes)
            one.run(layer, context)
        context.finish(layer)
        return context

    def _hold_folds(self, index: int) -> None:
        """Once for each kind of layer: folds that the model itself does not bear out are made by no method."""
        kind = self.decoder.architecture.kinds[index]
        if kind in self._held or not any(entry.input_scalers for entry in self.work.modules.values()):
            return
        self._clock.begin(PREPARE)
        self._held.add(kind)
        for line in drop_broken_folds(self.decoder, index):
            log.warning("a scale does not fold there: %s", line)

    def _check_base(self, index: int) -> None:
        """Raises NumericsError where the base model itself computes what its type cannot hold."""
        if not is_finite(self._streams["heldout_base"]):
            half = self.decoder.dtype == torch.float16
            raise NumericsError(
                f"the base model's own hidden states are not finite after layer {index}, in {self.decoder.dtype}; "
                + ("give --dtype bfloat16 --overwrite" if half else "the base is broken")
            )

    def _context(self, index: int) -> LayerContext:
        prefix = f"{self.decoder.layer_name(index)}."
        entries = self.work.modules.items()
        return LayerContext(
            decoder=self.decoder,
            index=index,
            modules={name.removeprefix(prefix): entry for name, entry in entries if name.startswith(prefix)},
            calibration=self._streams["calibration"],
            calibration_base=self._streams["calibration_base"] if self.work.paired else None,
            fp8_cache=bool(self.work.fp8_layers),
            compensates=self.work.compensates,
            scales_by_head=self.work.scales_by_head,
            clock=self._clock,
            read_on=index + 1 < self.decoder.depth or self._head_entry is not None or self.work.paired,
            result=LayerResult(fp8_in_use=index in self.work.fp8_layers),
        )

    def quality(self) -> QualityRecord:
        """Compare both streams at the end of the walk."""
        self._clock.begin(COMPARE)
        if self.journal.conclusion:
            return self.journal.conclusion.quality
        keep_no_freed_memory()  # layers are small and many, logits are large
        norm, head = self.decoder.head()
        base, ours = (self.decoder.finished(self._streams[name]) for name in ("heldout_base", "heldout"))
        our_norm, found = self._quantized_head(copy.deepcopy(norm), head)
        our_head = found.weight if found else None
        form = self.decoder.architecture.logits
        predictions = kl.compare(base, ours, norm, our_norm, head, self._judging, our_head, form)
        heldout, aside = torch.arange(len(self._judging)).tensor_split([len(self._heldout_text.ids)])
        measured = kl.summarize(
            predictions.of(heldout),
            self._heldout_text,
            kv_cache_included=any(record.kv_scales for record in self.layers),
            calibration=self._on_calibration(norm, our_norm, head, our_head),
            set_aside=kl.divergence(predictions.of(aside)) if len(aside) else None,
            **self._baselines.measure(base, norm, head),
        )
        files = self._base_files
        record = ranks.by_first(lambda: self._write_head(our_norm, found) if found else None)
        self.journal.conclude(Conclusion(quality=measured, base_files=files, head=record))
        return measured

    def _on_calibration(
        self, norm: nn.Module, our_norm: nn.Module, head: Tensor, our_head: Tensor | None
    ) -> DivergenceRecord | None:
        """The same comparison on as many sequences of the calibration text, where the base model's walked too."""
        if not self.work.paired:
            return None
        some, form = slice(None, len(self._heldout_text.ids)), self.decoder.architecture.logits
        base, ours = (
            self.decoder.finished(self._streams[name][some]) for name in ("calibration_base", "calibration")
        )
        ids = self._calibration_text.ids[some]
        return kl.divergence(kl.compare(base, ours, norm, our_norm, head, ids, our_head, form))

    @property
    def head(self) -> HeadRecord | None:
        """What is recorded of a quantized head, once the walk has ended."""
        return self.journal.conclusion.head if self.journal.conclusion else None

    @property
    def _head_entry(self) -> ModulePlan | None:
        return self.work.modules.get(self.decoder.architecture.head)

    def _quantized_head(self, norm: nn.Module, head: Tensor) -> tuple[nn.Module, QuantizedHead | None]:
        """The final norm that is served, and the head where it is quantized."""
        entry, offset = self._head_entry, self.decoder.architecture.final_norm_offset
        if entry is None:
            return norm, None
        states = self.decoder.finished(self._streams["calibration"])
        return norm, quantize_head(norm, head, entry, states, offset, fold=self.work.fold_head)

    def _write_head(self, norm: nn.Module, found: QuantizedHead) -> HeadRecord:
        architecture, entry, names = self.decoder.architecture, self._head_entry, self.decoder.names
        assert entry is not None
        tensors = {f"{architecture.head}.{key}": value for key, value in found.tensors.items()}
        behind = {f"{architecture.final_norm}.{key}": value for key, value in norm.state_dict().items()}
        packed_bytes = sum(tensor.nbytes for tensor in found.tensors.values())
        name, (words, hidden) = names.published(architecture.head), found.weight.shape
        unopened = UnopenedLinear(shape=(words, hidden), sample=found.sample)
        return HeadRecord(
            shard=self.writer.write_shard(names.publish(behind | tensors)),
            module=record_of(name, entry, found, found.weight.numel(), packed_bytes),
            unopened=unopened if reader_of(entry.scheme, found.weight.shape, expert=False) else None,
        )

    def _layer_writer(self, index: int) -> LayerWriter | None:
        """None on a rank that writes nothing."""
        if not ranks.is_first():
            return None
        decoder = self.decoder
        layer = decoder.layer(index)
        most = PARTS * len(layer.state_dict()) if kind_of(layer).experts else None
        return LayerWriter(
            self.writer,
            self.work.names or decoder.names,
            decoder.architecture,
            self.work.modules,
            decoder.layer_name(index),
            most,
        )

    def _finish(self, layer: nn.Module, index: int, result: LayerResult, written: LayerWriter | None) -> None:
        """Write what is left of a layer, and note that it is done."""
        if index + 1 == self.decoder.depth:
            self._pass_dropped(index + 1)
        self._clock.begin(WRITE)
        files = self._base_files

        def write() -> LayerRecord:
            assert written is not None
            scales = result.kv_scales
            others = kv_tensors(kind_of(layer).attention, scales)
            written.add(beside(layer, result.linears) | others, result.linears)
            return LayerRecord(
                layer=index,
                shard=written.close(),
                modules=written.modules,
                kv_scales=KVLayerRecord(layer=index, **asdict(scales)) if scales else None,
                kept_experts=result.kept_experts,
                absorbed_by=result.absorbed_by,
                saliency=result.saliency,
                expert_tokens=result.expert_tokens,
                under_calibrated=result.under_calibrated,
                figures=result.figures,
                base_files=files,
                streams=self.journal.save_streams(index, self._streams),
                unopened=written.unopened,
            )

        self.journal.finish(ranks.by_first(write))

    @property
    def _base_files(self) -> list[str]:
        """The base model's files that were read so far, by any rank."""
        read = ranks.in_order([set(self.decoder.weights.read_files)], torch.device("cpu"))
        return sorted(set().union(*read))

"""What the installed vLLM reads of a quantized head; and of embeddings, whose rows it looks up: why they stay plain."""

import inspect
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from tests.contract.begun import made_or_begun

from lowbit_quantize.catalog import CATALOG
from lowbit_quantize.misfits import OF_WHOLE_TENSORS
from lowbit_quantize.plan import EMBEDDING_STAYS
from lowbit_quantize.run.served_config import quantization_config
from lowbit_quantize.schemes.integer import BITS, Integer
from lowbit_quantize.schemes.processors.linears import LINEARS
from lowbit_quantize.schemes.scheme import Scheme
from lowbit_quantize.schemes.storage.packed_words import words_of

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")

WORDS, HIDDEN, GROUP = 500, 128, 32
HEAD, EMBEDDING = "lm_head", "model.embed_tokens"
WEIGHTS_ALONE = {
    preset.name: scheme
    for preset in CATALOG.presets
    if (scheme := preset.make(GROUP)).input_quantizer is None and scheme.format not in OF_WHOLE_TENSORS
}


def config_of(name: str, scheme: Scheme) -> Any:
    """vLLM's configuration of a checkpoint that has one module in a scheme."""
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsConfig,
    )

    written = quantization_config({name: scheme}, [], fp8_cache=False)
    assert written is not None
    return CompressedTensorsConfig.from_config(written)


def four_bits() -> tuple[Integer, dict[str, torch.Tensor]]:
    """A head of 4 bits, for which this processor has a kernel."""
    scheme = Integer(4, GROUP, True, "W4A16")
    weight = torch.randn(WORDS, HIDDEN, generator=torch.Generator().manual_seed(0))
    params = scheme.search(weight, None)
    return scheme, scheme.tensors(scheme.quantize(weight, params), params)


@pytest.mark.parametrize("name", WEIGHTS_ALONE)
def test_a_head_is_an_ordinary_linear_of_every_scheme_that_it_may_have(one_rank: Any, name: str) -> None:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    config, head = config_of(HEAD, WEIGHTS_ALONE[name]), ParallelLMHead(WORDS, HIDDEN)
    scheme = made_or_begun(lambda: config.get_scheme(head, HEAD))
    assert type(scheme).__name__ == LINEARS[name].scheme_class
    if name in BITS:
        assert scheme.num_bits == BITS[name]


def test_a_head_is_loaded_as_we_store_it_and_filled_up(one_rank: Any) -> None:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("this is vLLM's build for another device")
    scheme, stored = four_bits()
    head = ParallelLMHead(WORDS, HIDDEN, quant_config=config_of(HEAD, scheme), prefix=HEAD)
    for name, parameter in head.named_parameters():
        if name != "weight_shape":
            head.weight_loader(parameter, stored[name])
            assert len(parameter) == 512
            assert torch.equal(parameter[:WORDS], stored[name])


def test_a_quantized_embedding_is_looked_up_by_a_kernel_that_cpus_do_not_have(one_rank: Any) -> None:
    from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors_embedding
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    scheme, _ = four_bits()
    embedding = VocabParallelEmbedding(
        WORDS, HIDDEN, quant_config=config_of(EMBEDDING, scheme), prefix=EMBEDDING
    )
    method = embedding.quant_method
    assert isinstance(method, compressed_tensors_embedding.CompressedTensorsEmbeddingWNA16Int)
    assert "_dequant_gather_triton(" in inspect.getsource(method.embedding)
    with pytest.raises(NotImplementedError, match="embedding lookup only"):  # it gives no logits
        method.apply(embedding, torch.zeros(1, HIDDEN))
    assert "quantized rows on GPUs only" in EMBEDDING_STAYS


def test_a_head_is_not_tied_to_a_quantized_embedding(one_rank: Any) -> None:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    scheme, _ = four_bits()
    config = config_of(EMBEDDING, scheme)
    embedding = VocabParallelEmbedding(WORDS, HIDDEN, quant_config=config, prefix=EMBEDDING)
    with pytest.raises(AttributeError, match="weight"):
        ParallelLMHead(WORDS, HIDDEN, quant_config=config, prefix=HEAD).tie_weights(embedding)
    assert "none of a matrix that is the head too" in EMBEDDING_STAYS


@pytest.mark.parametrize("bits", [3, 5, 6])
def test_embeddings_across_words_are_read_otherwise_than_linears(bits: int) -> None:
    """With a gap at the end of each word, as the older library packs: a dense one would not load."""
    from compressed_tensors.quantization import QuantizationArgs
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_embedding import (
        CompressedTensorsEmbeddingWNA16Int,
    )

    weights = QuantizationArgs(num_bits=bits, type="int", strategy="group", group_size=GROUP, symmetric=True)
    method = CompressedTensorsEmbeddingWNA16Int(weights)
    assert 576 // method.pack_factor > words_of(576, bits)

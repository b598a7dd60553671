"""An embedding model, quantized by `lowbit quantize` and served on the real engine: embeddings, ranking, scores."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch
from openai import NotFoundError, OpenAI
from prometheus_client.parser import text_string_to_metric_families
from scripts.demo import MODEL, serving
from tests.e2e.embedding_model import FORMS, embeddings, write_embedding_model
from tests.e2e.test_families import SMALL
from torch import Tensor

from lowbit_core.server_process import free_port
from lowbit_quantize.pipeline import quantize
from lowbit_quantize.recipe import load_recipe

pytestmark = pytest.mark.engine

TEXTS = [
    "The harbour was full of boats.",
    "A boat left the harbour at dawn.",
    "Interest on the loan is due in March.",
    "She wrote the proof on the back of an envelope.",
]


@dataclass
class Served:
    """A quantized model that embeds, at its URL; its directory and its base's."""

    url: str
    base: Path
    checkpoint: Path

    def vectors(self, texts: list[str]) -> Tensor:
        answer = OpenAI(base_url=f"{self.url}/v1", api_key="none").embeddings.create(model=MODEL, input=texts)
        assert answer.usage.prompt_tokens > 0
        return torch.tensor([one.embedding for one in answer.data])  # (texts, hidden)

    def counted(self) -> float:
        """Prompt tokens that the server has counted, as its metrics say."""
        families = text_string_to_metric_families(httpx.get(f"{self.url}/metrics").text)
        samples = [
            one for family in families for one in family.samples if one.name == "lowbit_key_tokens_total"
        ]
        return sum(one.value for one in samples if one.labels["kind"] == "prompt")


@pytest.fixture(scope="module", params=FORMS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp(request.param)
    base = write_embedding_model(folder / "base", request.param)
    quantize(str(base), load_recipe("awq-g64", SMALL), folder / "out", torch.device("cpu"))
    flags = "--max-model-len", "128", "--kv-cache-dtype", "bfloat16"  # as plain transformers has it
    with serving(folder / "out", free_port(), *flags) as url:
        yield Served(url, base, folder / "out")


def test_embeddings_are_those_of_the_checkpoint_near_the_bases_and_counted(served: Served) -> None:
    """The weights are random, which 4 bits change more than those of a model that has learned anything."""
    before = served.counted()
    ours = served.vectors(TEXTS)
    assert torch.allclose(ours.norm(dim=-1), torch.ones(len(TEXTS)), atol=1e-3)
    opened, bases = (embeddings(one, TEXTS) for one in (served.checkpoint, served.base))
    assert (ours @ opened.T).diagonal().min() > 0.98
    assert (ours @ bases.T).argmax(dim=-1).tolist() == list(range(len(TEXTS)))
    asked = httpx.post(f"{served.url}/v1/embeddings", json={"input": TEXTS}, timeout=60).json()
    assert served.counted() - before == 2 * asked["usage"]["prompt_tokens"]


def test_documents_are_ranked_and_pairs_are_scored_by_their_embeddings(served: Served) -> None:
    vectors = served.vectors(TEXTS)
    nearness = (vectors[0] @ vectors[1:].T).tolist()
    body = {"query": TEXTS[0], "documents": TEXTS[1:]}
    for path in ("/v1/rerank", "/rerank", "/v2/rerank"):
        results = httpx.post(f"{served.url}{path}", json=body, timeout=60).json()["results"]
        order = [one["index"] for one in results]
        assert order == sorted(range(3), key=lambda i: -nearness[i])
        for one in results:
            assert one["relevance_score"] == pytest.approx(nearness[one["index"]], abs=1e-2)
    for path in ("/v1/score", "/score"):
        pair = {"queries": TEXTS[0], "documents": TEXTS[1:]}
        scores = [
            one["score"] for one in httpx.post(f"{served.url}{path}", json=pair, timeout=60).json()["data"]
        ]
        assert scores == pytest.approx(nearness, abs=1e-2)
    invoked = httpx.post(f"{served.url}/invocations", json=body, timeout=60).json()["results"]
    assert [one["index"] for one in invoked] == order
    pooled = httpx.post(f"{served.url}/pooling", json={"input": TEXTS[:2]}, timeout=60).json()["data"]
    assert torch.tensor([one["data"] for one in pooled]).reshape(2, -1).shape == vectors[:2].shape


def test_what_such_a_model_does_not_do_is_not_found(served: Served) -> None:
    client = OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(NotFoundError):
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hello"}])

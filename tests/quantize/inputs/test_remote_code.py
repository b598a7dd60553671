"""Code of a model's own is never run and never asked about, but for a tokenizer's with --trust-remote-code."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.quantize.small_runs import SMALL_FLAGS

from lowbit_core.errors import ModelError
from lowbit_quantize.model.reference import find_model

CODE = "from pathlib import Path\nPath({ran!r}).write_text('')\nfrom transformers import PreTrainedTokenizerFast\n"
OWN_TOKENIZER = "class OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"


@pytest.fixture
def own_tokenizer(tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    """A model whose tokenizer is code beside it, which leaves the file `ran`."""
    directory = shutil.copytree(tiny_model("llama"), tmp_path / "own")
    edit(
        directory / "tokenizer_config.json",
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]},
    )
    code = CODE.format(ran=str(tmp_path / "ran")) + OWN_TOKENIZER
    (directory / "tokenization_own.py").write_text(code)
    return directory


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def run(directory: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, at whose standard input somebody says yes to everything."""
    command = [sys.executable, "-c", "from lowbit_core.cli import main; raise SystemExit(main())", "quantize"]
    model = ["--model", str(directory), "--out", str(directory.parent / "out"), "--recipe", "rtn-g64"]
    return subprocess.run(
        [*command, *model, *SMALL_FLAGS, *flags],
        input="y\n" * 9,
        env={**os.environ, "HF_HOME": str(directory.parent / "home")},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_tokenizer_that_is_code_is_refused_without_a_question(own_tokenizer: Path) -> None:
    ran = run(own_tokenizer)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "is code of its own (tokenization_own.OwnTokenizer), which is not run" in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1
    assert not (own_tokenizer.parent / "ran").exists()


def test_a_tokenizer_that_is_code_runs_where_it_may(own_tokenizer: Path) -> None:
    ran = run(own_tokenizer, "--trust-remote-code")
    assert ran.returncode == 0, ran.stderr
    assert (own_tokenizer.parent / "ran").exists()
    manifest = json.loads((own_tokenizer.parent / "out" / "lowbit.json").read_text())
    assert manifest["base"]["remote_code"] is True


def test_code_that_transformers_does_not_need_is_not_run(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = shutil.copytree(tiny_model("llama"), tmp_path / "own")
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    edit(directory / "config.json", auto_map=own)
    edit(directory / "tokenizer_config.json", auto_map={"AutoTokenizer": "own.OwnTokenizer"})
    (directory / "own.py").write_text(CODE.format(ran=str(tmp_path / "ran")))
    for trusted in (False, True):
        reference = find_model(str(directory), trust_remote_code=trusted)
        assert type(reference.config).__name__ == "LlamaConfig"
        assert reference.tokenizer()("two words").input_ids
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("trusted", [False, True])
def test_a_model_that_is_code_is_refused_even_where_code_may_run(
    trusted: bool, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = shutil.copytree(tiny_model("llama"), tmp_path / "own")
    edit(directory / "config.json", model_type="own", auto_map={"AutoConfig": "own.OwnConfig"})
    (directory / "own.py").write_text(CODE.format(ran=str(tmp_path / "ran")))
    with pytest.raises(
        ModelError, match=r"is code of its own \(auto_map in config.json\) for the model type 'own'"
    ):
        _ = find_model(str(directory), trust_remote_code=trusted).config
    assert not (tmp_path / "ran").exists()

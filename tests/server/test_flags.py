"""Flags and environment variables become one checked configuration, before vLLM is imported."""

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lowbit_core.errors import CheckpointError, ConfigError
from lowbit_server.cli import add_serve_arguments, config_from, log, prepare_environment, run
from lowbit_server.config import ServeConfig, refuse_uneven_nodes

if TYPE_CHECKING:
    from tests.server.conftest import MakeCheckpoint


def _parse(words: list[str], environment: dict[str, str] | None = None) -> ServeConfig:
    parser = argparse.ArgumentParser()
    add_serve_arguments(parser, environment or {})
    return config_from(parser.parse_args(words))


def test_defaults_of_flags_are_those_of_the_class() -> None:
    config = _parse(["ckpt"])
    assert config == ServeConfig(directory=config.directory)


def test_flag_wins_over_environment_and_environment_over_default() -> None:
    environment = {"LOWBIT_PORT": "9000", "LOWBIT_HOST": "::1", "LOWBIT_ENFORCE_EAGER": "true"}
    config = _parse(["ckpt", "--port", "9001"], environment)
    assert (config.port, config.host, config.enforce_eager) == (9001, "::1", True)


@pytest.mark.parametrize(
    ("flag", "text", "allowed"),
    [
        ("--port", "0", "a whole number from 1 to 65535"),
        ("--max-num-seqs", "many", "a whole number from 1 to 65536"),
        ("--kv-cache-gib", "nan", "a number of GiB above 0"),
        ("--gpu-memory-utilization", "1.5", "a number above 0 and at most 1"),
        ("--kv-cache-dtype", "int4", "one of auto, fp8, bfloat16"),
    ],
)
def test_wrong_value_is_one_line_whether_flag_or_variable(flag: str, text: str, allowed: str) -> None:
    variable = "LOWBIT_" + flag[2:].replace("-", "_").upper()
    message = f"{flag} (or {variable}) is {text!r}; it must be {allowed}"
    for words, environment in (([flag, text], {}), ([], {variable: text})):
        with pytest.raises(ConfigError) as raised:
            _parse(["ckpt", *words], environment)
        assert str(raised.value) == message


def test_service_link_of_kubernetes_is_not_taken_for_our_port() -> None:
    assert _parse(["ckpt"], {"LOWBIT_PORT": "tcp://10.0.0.7:8000"}).port == ServeConfig.port


def test_flags_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match="say the same thing; give one of them"):
        _parse(["ckpt", "--kv-cache-gib", "1", "--kv-cache-memory-bytes", "1"])
    with pytest.raises(ConfigError, match="LOWBIT_ALLOW_REJECTED=maybe: give 1 or 0"):
        _parse(["ckpt"], {"LOWBIT_ALLOW_REJECTED": "maybe"})
    with pytest.raises(ConfigError, match="give the checkpoint directory: lowbit serve DIR"):
        _parse([])


def test_refusal_comes_before_vllm_is_imported(make_checkpoint: "MakeCheckpoint") -> None:
    directory = make_checkpoint(accepted=False)
    parser = argparse.ArgumentParser()
    add_serve_arguments(parser, {})
    with pytest.raises(CheckpointError):
        run(parser.parse_args([str(directory)]))


@pytest.mark.parametrize(
    ("nnodes", "rank", "message"),
    [
        (
            3,
            0,
            "--tensor-parallel-size 2 x --pipeline-parallel-size 2 = 4 devices do not divide among --nnodes 3",
        ),
        (2, 2, "--node-rank 2 is none of --nnodes 2: they are counted from 0"),
    ],
)
def test_nodes_that_do_not_fit_are_refused(
    make_checkpoint: "MakeCheckpoint", nnodes: int, rank: int, message: str
) -> None:
    config = ServeConfig(
        make_checkpoint(), tensor_parallel_size=2, pipeline_parallel_size=2, nnodes=nnodes, node_rank=rank
    )
    with pytest.raises(ConfigError) as raised:
        refuse_uneven_nodes(config)
    assert str(raised.value) == message


@pytest.mark.parametrize(("given", "warned"), [(None, False), ("0", False), ("1", True)])
def test_activations_are_not_quantized_unless_the_user_says_so_and_is_warned(
    caplog: pytest.LogCaptureFixture, given: str | None, warned: bool
) -> None:
    """On CPUs with AMX vLLM's default quantizes them to 8 bits, which was not measured."""
    environment = {} if given is None else {"VLLM_CPU_INT4_W4A8": given}
    log.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.WARNING, log.name):  # libraries that vLLM imports set the root's level
            prepare_environment("INFO", environment)
    finally:
        log.removeHandler(caplog.handler)
    assert environment["VLLM_CPU_INT4_W4A8"] == (given or "0")
    assert any("was not measured" in record.getMessage() for record in caplog.records) == warned


def test_a_user_without_a_home_gets_one_for_caches() -> None:
    nobody: dict[str, str] = {}
    prepare_environment("INFO", nobody, uid=123456)
    assert Path(nobody["HOME"]).is_dir()
    assert nobody["USER"] == "lowbit"
    Path(nobody["HOME"]).rmdir()
    given: dict[str, str] = {"HOME": "/mine"}
    prepare_environment("INFO", given, uid=123456)
    assert given["HOME"] == "/mine"
    listed: dict[str, str] = {}
    prepare_environment("INFO", listed, uid=0)
    assert "HOME" not in listed


@pytest.mark.parametrize(
    "given",
    [
        "https://a.example",
        "*",
        "http://localhost:3000,https://b.example:8443",
        "http://[::1]:8080",
        "tauri://localhost",
        "chrome-extension://abcdef",
        " https://a.b , ",
    ],
)
def test_origins_as_browsers_send_them_are_taken(given: str) -> None:
    assert _parse(["ckpt", "--cors-origins", given]).cors_origins == tuple(
        one.strip() for one in given.split(",") if one.strip()
    )


@pytest.mark.parametrize(
    "given",
    [
        "https://a.example/",
        "a.example",
        "https://a.example/page",
        "https://A.example",
        "HTTPS://a.example",
        "null",
        "https://a.example:443",
        "http://a.example:80",
        "https://*.example",
        "https://a.example;https://b.example",
        "https://ü.example",
        "https://a.example:0",
        "https://user@a.example",
        "//a.example",
    ],
)
def test_origins_that_no_browser_sends_are_refused_at_the_start(given: str) -> None:
    with pytest.raises(ConfigError, match=r"--cors-origins .* it must be origins by comma"):
        _parse(["ckpt", "--cors-origins", f"https://sound.example,{given}"])


def test_a_model_may_have_several_names_and_slashes_in_them() -> None:
    assert _parse(["ckpt"]).served_model_name == ()
    assert _parse(["ckpt", "--served-model-name", "org/smol, smol"]).served_model_name == ("org/smol", "smol")
    for wrong in ("", ",", "a,a", "/a", "a/", "a\nb"):
        with pytest.raises(ConfigError, match="names by comma"):
            _parse(["ckpt", "--served-model-name", wrong])


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("http://base:8000", "http://base:8000"),
        ("http://base:8000/", "http://base:8000"),
        ("https://a.example/llm/v1/", "https://a.example/llm"),
        ("http://[::1]:8000/v1", "http://[::1]:8000"),
    ],
)
def test_the_bases_address_is_taken_with_v1_or_without(given: str, taken: str) -> None:
    assert _parse(["ckpt", "--shadow", given]).shadow == taken


@pytest.mark.parametrize(
    "given",
    [
        "base:8000",
        "ftp://a",
        "http://",
        "http://a:b@c",
        "http://a?b",
        "http://a#b",
        "http://a:0",
        "http://a:x",
        "http://a b\n",
    ],
)
def test_what_is_no_address_of_a_server_is_refused(given: str) -> None:
    with pytest.raises(ConfigError, match=r"--shadow .* it must be an address such as"):
        _parse(["ckpt", "--shadow", given])


@pytest.mark.parametrize("given", ["0", "-1", "free", "nan", "inf", ""])
def test_a_price_is_above_zero(given: str) -> None:
    with pytest.raises(ConfigError, match=r"--price-per-hour .* a price above 0"):
        _parse(["ckpt", "--price-per-hour", given])


def test_a_key_for_no_base_is_refused() -> None:
    with pytest.raises(ConfigError, match="--shadow-key-file is for the endpoint that --shadow names"):
        _parse(["ckpt", "--shadow-key-file", "key"])

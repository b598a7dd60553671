"""TLS certificates: one that does not fit is found before loading, a renewed one is taken without a restart."""

import asyncio
import os
import ssl
import subprocess
from pathlib import Path

import pytest
from fastapi import FastAPI
from tests.server.http.raw_sockets import read_to_the_end

from lowbit_core.cli import main
from lowbit_core.errors import ConfigError
from lowbit_server.config import ServeConfig
from lowbit_server.http.certificates import Certificates, open_certificate
from lowbit_server.http.listeners import bind
from lowbit_server.http.serving import serving

RSA, EC = ("rsa:2048",), ("ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")


def pair(folder: Path, name: str, kind: tuple[str, ...] = EC) -> tuple[Path, Path]:
    """A certificate for CN=name, and its key."""
    certificate, key = folder / f"{name}.crt", folder / f"{name}.key"
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", *kind, "-nodes", "-days", "1", "-subj", f"/CN={name}",
            "-keyout", str(key), "-out", str(certificate),
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    return certificate, key


def replace(path: Path, by: Path) -> None:
    """As an operator of certificates does it: another file under the same name."""
    temporary = path.with_suffix(".new")
    temporary.write_bytes(by.read_bytes())
    os.replace(temporary, path)


async def shown(port: int) -> str:
    """The common name of the certificate that a handshake gets."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    found: bytes = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return next(name for name in ("first", "second", "third") if name.encode() in found)


@pytest.mark.parametrize("kinds", [(EC, EC), (RSA, EC), (EC, RSA)])
async def test_a_renewed_certificate_is_taken_without_a_restart(
    tmp_path: Path, kinds: tuple[tuple[str, ...], tuple[str, ...]]
) -> None:
    certificate, key = pair(tmp_path, "first", kinds[0])
    second = pair(tmp_path, "second", kinds[1])
    certificates = Certificates(certificate, key)
    watch = asyncio.create_task(certificates.watch(every_s=0.05))

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=certificates.context)
    port = server.sockets[0].getsockname()[1]
    assert await shown(port) == "first"
    replace(certificate, second[0])  # and its key comes a moment later
    await asyncio.sleep(0.2)
    assert await shown(port) == "first"
    replace(key, second[1])
    await asyncio.sleep(0.2)
    assert await shown(port) == "second"
    key.unlink()
    await asyncio.sleep(0.2)
    assert await shown(port) == "second"
    watch.cancel()
    server.close()


async def test_the_server_serves_the_pair_of_its_flags(tmp_path: Path) -> None:
    certificate, key = pair(tmp_path, "first")
    config = ServeConfig(tmp_path, ssl_certfile=certificate, ssl_keyfile=key, drain_timeout_s=1)
    with bind("127.0.0.1", 0) as listener:
        async with serving(FastAPI(), listener, config):
            assert await shown(listener.getsockname()[1]) == "first"


async def test_clients_that_leave_in_the_handshake_or_send_no_tls_leave_nothing_behind(
    tmp_path: Path,
) -> None:
    certificate, key = pair(tmp_path, "first")
    config = ServeConfig(tmp_path, ssl_certfile=certificate, ssl_keyfile=key, drain_timeout_s=1)
    outgoing = ssl.MemoryBIO()
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="a")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    hello = outgoing.read()
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        async with serving(FastAPI(), listener, config) as running:
            for sent in (hello[:1], hello[:5], hello[:-1], hello):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(sent)
                await writer.drain()
                writer.transport.abort()
            for nonsense in (b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n", hello + b"junk" * 10):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(nonsense)
                await asyncio.wait_for(
                    read_to_the_end(reader), 5
                )  # an alert, or nothing: there is no TLS to answer in
                writer.close()
            assert await shown(port) == "first"
            await asyncio.sleep(0.1)
            assert running.server.server_state.connections == set()


def test_a_pair_that_does_not_fit_is_refused_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = pair(tmp_path, "first"), pair(tmp_path, "second")
    flags = ["--ssl-certfile", str(first[0]), "--ssl-keyfile", str(second[1])]
    assert main(["serve", str(tmp_path / "no-checkpoint"), *flags]) == 2
    assert "do not belong together" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("certificate", "key", "words"),
    [
        ("none.crt", "first.key", "--ssl-certfile .*none.crt cannot be read: No such file"),
        ("first.crt", "", "--ssl-keyfile .* cannot be read: Is a directory"),
        ("first.key", "first.key", "are not a PEM certificate and its key"),
        ("text", "first.key", "are not a PEM certificate and its key"),
        ("first.crt", "locked.key", "is encrypted; give a key without a password"),
    ],
)
def test_each_wrong_file_is_named(tmp_path: Path, certificate: str, key: str, words: str) -> None:
    _, plain = pair(tmp_path, "first")
    (tmp_path / "text").write_text("no certificate")
    subprocess.run(
        ["openssl", "pkcs8", "-topk8", "-in", plain, "-passout", "pass:x", "-out", tmp_path / "locked.key"],
        check=True, capture_output=True,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=words):
        open_certificate(tmp_path / certificate, tmp_path / key)

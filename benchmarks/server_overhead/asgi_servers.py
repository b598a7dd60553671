"""ASGI servers compared on one streaming app, without an engine: what a piece of a stream costs, and who is right.

    python benchmarks/server_overhead/asgi_servers.py --work DIR --out benchmarks/server_overhead/results/NAME.json

Ours is uvicorn with the protocol of lowbit_server/gateway; beside it uvicorn's protocols, hypercorn and granian, each
as it comes, in an environment under DIR. Rounds rotate the order. Cost is CPU time of the server's processes by chunk,
over all chunks of a cell. Behaviour is what clients meet that are no browsers: each row is an exchange over a raw
socket.
"""

import argparse
import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.endpoint import write_result  # noqa: E402
from benchmarks.server_overhead.mock_app import CHUNKS  # noqa: E402

from lowbit_core.server_process import free_port  # noqa: E402

HERE = Path(__file__).resolve().parent
PACKAGES = (
    "uvicorn==0.54.0",
    "uvloop",
    "httptools",
    "h11",
    "zttp==0.0.35",
    "hypercorn==0.18.0",
    "granian==2.8.9",
)
STREAMS = (1, 32, 256)
UVICORN = (
    "-m",
    "uvicorn",
    "mock_app:app",
    "--loop",
    "uvloop",
    "--log-level",
    "error",
    "--no-access-log",
    "--port",
)
SERVERS: dict[str, tuple[str, ...]] = {
    "ours": (),
    "uvicorn httptools": ("--http", "httptools"),
    "uvicorn h11": ("--http", "h11"),
    "uvicorn zttp": ("--http", "zttp"),
    "hypercorn": ("hypercorn",),
    "granian": ("granian",),
}
GET = b"GET %s HTTP/1.1\r\nHost: a\r\n"
UPGRADE = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQ\r\n"
HEAD_S = 40.0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=list(SERVERS))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    python = environment(arguments.work)
    costs: dict[str, dict[int, list[float]]] = {
        name: {streams: [] for streams in STREAMS} for name in SERVERS
    }
    behaviour = {}
    names = arguments.servers
    for number in range(arguments.rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            with server(name, python) as (port, process):
                for streams in STREAMS:
                    costs[name][streams].append(cost(port, process, streams))
                if number == 0:
                    behaviour[name] = asyncio.run(behaviours(port))
    microseconds = {
        name: {str(streams): round(statistics.median(found), 1) for streams, found in by_streams.items()}
        for name, by_streams in costs.items()
        if name in names
    }
    write_result(
        arguments.out,
        {"packages": PACKAGES, "rounds": arguments.rounds, "cpu_microseconds_per_chunk": microseconds,
         "turns": costs, "behaviour": behaviour},
    )  # fmt: skip
    for name in names:
        print(json.dumps({"server": name, "cpu_us_per_chunk": microseconds[name], **behaviour[name]}))
    return 0


def environment(work: Path) -> Path:
    python = work / "asgi" / "bin" / "python"
    if not python.exists():
        venv.create(work / "asgi", with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES], check=True)
    return python


@contextlib.contextmanager
def server(name: str, python: Path) -> Iterator[tuple[int, psutil.Process]]:
    """A server that answers, until the block ends."""
    port = free_port()
    if name == "ours":
        command = [sys.executable, "mock_app.py", str(port)]
    elif name == "hypercorn":
        command = [python, "-m", "hypercorn", "mock_app:app", "-k", "uvloop", "--bind", f"127.0.0.1:{port}"]
    elif name == "granian":
        command = [
            python.with_name("granian"), "mock_app:app", "--interface", "asgi", "--loop", "uvloop", "--port", str(port),
            "--no-access-log", "--log-level", "error",
        ]  # fmt: skip
    else:
        command = [python, *UVICORN, str(port), *SERVERS[name]]
    process = subprocess.Popen(list(map(str, command)), cwd=HERE, stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with contextlib.suppress(OSError):
                asyncio.run(exchange(port, GET % b"/x" + b"\r\n", 0.5))
                break
            time.sleep(0.1)
        yield port, psutil.Process(process.pid)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def cost(port: int, process: psutil.Process, streams: int) -> float:
    """CPU microseconds by chunk, over some seconds of so many streams."""
    repeats = {1: 8, 32: 4, 256: 3}[streams]

    async def load() -> None:
        await asyncio.gather(*(client(number) for number in range(streams)))

    async def client(number: int) -> None:
        await asyncio.sleep(number * 0.03 / streams)
        for _ in range(repeats):
            found = await exchange(
                port, b"POST /stream HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}"
            )
            if b"[DONE]" not in found:
                raise SystemExit("a stream was cut")

    before = cpu_s(process)
    asyncio.run(load())
    return (cpu_s(process) - before) / (streams * repeats * CHUNKS) * 1e6


def cpu_s(process: psutil.Process) -> float:
    """The kernel's count in nanoseconds; psutil's is in hundredths of a second."""
    tasks = (
        task
        for one in (process, *process.children(recursive=True))
        for task in Path(f"/proc/{one.pid}/task").glob("*/schedstat")
    )
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


async def exchange(port: int, sent: bytes, within_s: float = 20.0, half_close: bool = False) -> bytes:
    """What comes until the server closes or the time is over."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    found = b""
    try:
        writer.write(sent)
        if half_close:
            writer.write_eof()
        async with asyncio.timeout(within_s):
            while part := await reader.read(65536):
                found += part
    except (TimeoutError, ConnectionError):
        pass
    finally:
        writer.close()
    return found


async def behaviours(port: int) -> dict[str, bool]:
    rows: dict[str, Callable[[int], Awaitable[bool]]] = {
        "h2c offer keeps the body": keeps_the_body,
        "HTTP/1.0 without chunks": no_chunks,
        "half-closed client answered": answers_half_closed,
        "second head without end is closed": closes_second_head,
        "early answer reaches a sender of 20 MB": early_answer,
        "100,000 bytes of head refused": large_head,
    }
    found = await asyncio.gather(*(check(port) for check in rows.values()), return_exceptions=True)
    return {name: one is True for name, one in zip(rows, found, strict=True)}


async def keeps_the_body(port: int) -> bool:
    sent = b"POST /x HTTP/1.1\r\nHost: a\r\n" + UPGRADE + b"Content-Length: 3\r\n\r\nabc"
    return b"body:abc" in await exchange(port, sent, 2)


async def no_chunks(port: int) -> bool:
    found = await exchange(port, b"GET /stream HTTP/1.0\r\n\r\n", 5)
    return b"[DONE]" in found and b"chunked" not in found.lower()


async def answers_half_closed(port: int) -> bool:
    return b"[DONE]" in await exchange(port, GET % b"/stream" + b"\r\n", 5, half_close=True)


async def closes_second_head(port: int) -> bool:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(GET % b"/x" + b"\r\n" + GET % b"/y")
    try:
        async with asyncio.timeout(HEAD_S):
            while not reader.at_eof():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(reader.read(65536), 1)
                writer.write(b"X-A: b\r\n")
    except TimeoutError:
        return False
    except ConnectionError:
        return True
    finally:
        writer.close()
    return True


async def early_answer(port: int) -> bool:
    head = b"POST /refuse HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 20000000\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    found = b""
    try:
        writer.write(head)
        for _ in range(200):
            writer.write(b"x" * 100_000)
            await asyncio.wait_for(writer.drain(), 5)
    except (TimeoutError, ConnectionError):
        pass
    with contextlib.suppress(TimeoutError, ConnectionError):
        found = await asyncio.wait_for(reader.read(65536), 5)
    writer.close()
    return b"body:" in found


async def large_head(port: int) -> bool:
    found = await exchange(port, GET % b"/x" + b"X-A: " + b"a" * 100_000 + b"\r\n\r\n", 3)
    return found[9:12] in (b"400", b"431")


if __name__ == "__main__":
    sys.exit(main())

"""A stop while something loads: at once, and nothing stays behind. Each in a process of its own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lowbit_server.lifecycle import leaving_at_once_on_signals

# A parent that loads for ever, as vLLM's constructor does: children that ignore signals, grandchildren whose parent
# dies, one child after the other while it is being stopped.
PROGRAM = """
import asyncio, os, subprocess, sys, time
from lowbit_server.lifecycle import *
CHILD = "import signal, time; [signal.signal(n, signal.SIG_IGN) for n in (2, 15)]; time.sleep(600)"
PARENT = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {CHILD!r}])"

def load():
    for source in (CHILD, PARENT, CHILD):
        subprocess.Popen([sys.executable, "-c", source])
    print("loading", flush=True)
    while True:
        try:
            for _ in range(int(sys.argv[1])):
                subprocess.Popen([sys.executable, "-c", CHILD])
                time.sleep(0.01)
            time.sleep(600)
        except BaseException:  # as a finalizer may
            pass

async def main():
    state = DrainState()
    state.listen_to_signals()
    await unless_stopped(in_thread(load), state.requested)

with leaving_at_once_on_signals():
    try:
        asyncio.run(main())
    except StoppedWhileLoadingError:
        os._exit(INTERRUPTED)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("to_group", [False, True])
@pytest.mark.parametrize("more", [0, 100])
def test_a_stop_while_loading_leaves_nothing(
    tmp_path: Path, number: signal.Signals, to_group: bool, more: int
) -> None:
    command = [sys.executable, "-c", PROGRAM, str(more)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == b"loading\n"
    time.sleep(0.3)
    (os.killpg if to_group else os.kill)(process.pid, number)
    assert process.wait(10) == 130
    left = [one for one in psutil.process_iter() if _session(one) == process.pid]
    assert left == []


def _session(process: psutil.Process) -> int:
    try:
        return -1 if process.status() == psutil.STATUS_ZOMBIE else os.getsid(process.pid)
    except (ProcessLookupError, psutil.NoSuchProcess):
        return -1


def test_a_stop_before_anything_is_started_ends_the_process() -> None:
    program = (
        "import time\nfrom lowbit_server.lifecycle import *\nwith leaving_at_once_on_signals():\n"
        " print(1, flush=True)\n while True:\n  try: time.sleep(9)\n  except BaseException: pass"
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        process = subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(number)
        assert process.communicate(timeout=5)[1] == b"lowbit: interrupted\n"
        assert process.returncode == 130


def test_handlers_come_back_when_the_server_has_ended() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with leaving_at_once_on_signals():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before

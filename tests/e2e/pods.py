"""The rendered chart's pods as processes of this machine: their own command and environment, with what only a
cluster has put in its place — the mounted checkpoint, the home volume, the port, and what the kubelet fills in."""

import os
import re
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from scripts.demo import LOWBIT, MODEL
from tests.helm.chart import Resource

from lowbit_core.server_process import ServerProcess, last_words, start_server

LOOPBACK = "127.0.0.1"
QUICK_START: Resource = {"servedModelName": MODEL, "kvCacheGib": 0.5, "enforceEager": True}


@dataclass(frozen=True)
class Pod:
    """A container's process, and the pod's specification that it follows."""

    server: ServerProcess
    spec: Resource

    @property
    def process(self) -> subprocess.Popen[bytes]:
        return self.server.process

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def log(self) -> Path:
        return self.server.log

    @property
    def budget_s(self) -> float:
        """What the startup probe allows."""
        probe = self.spec["containers"][0]["startupProbe"]
        return float(probe["periodSeconds"] * probe["failureThreshold"])

    @property
    def grace_s(self) -> float:
        """What Kubernetes waits after SIGTERM: the preStop hook takes its part before."""
        hook = self.spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        return float(self.spec["terminationGracePeriodSeconds"]) - float(hook[-1])

    def probe(self, kind: str) -> int:
        """The status that the kubelet's probe would see; 0 where nobody listens."""
        path = self.spec["containers"][0][f"{kind}Probe"]["httpGet"]["path"]
        try:
            with urllib.request.urlopen(self.url + path, timeout=5) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def wait_until_started(self) -> set[int]:
        """Wait as long as the startup probe does; returns the other statuses that it saw."""
        seen: set[int] = set()
        deadline = time.monotonic() + self.budget_s
        while (status := self.probe("startup")) != 200:
            assert self.process.poll() is None, f"it ended:\n{last_words(self.log)}"
            assert time.monotonic() < deadline, f"not ready within {self.budget_s} s:\n{last_words(self.log)}"
            seen.add(status)
            time.sleep(0.2)
        return seen

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait_until_ended(self, seconds: float) -> float:
        """Seconds until the process ended; its status is 0."""
        start = time.monotonic()
        assert self.process.wait(seconds) == 0, last_words(self.log)
        return time.monotonic() - start


@contextmanager
def running(
    resources: dict[str, Resource],
    template: Resource,
    checkpoint: Path,
    port: int,
    folder: Path,
    **filled: str,
) -> Iterator[Pod]:
    """Start a pod's first container; `filled` is what $(NAME) stands for in its environment."""
    spec = template["spec"]
    folder.mkdir()
    environment = container_environment(resources, spec["containers"][0], checkpoint, port, folder, filled)
    command = [*LOWBIT, *spec["containers"][0]["args"]]
    server = start_server(
        command, f"http://{LOOPBACK}:{port}", folder / "log", name="the pod", environment=environment
    )
    try:
        yield Pod(server, spec)
    finally:
        server.kill()


def container_environment(
    resources: dict[str, Resource],
    container: Resource,
    checkpoint: Path,
    port: int,
    folder: Path,
    filled: dict[str, str],
) -> dict[str, str]:
    """All of a container's environment and nothing of ours but PATH."""
    given: dict[str, str] = dict(resources["ConfigMap"]["data"]) if "envFrom" in container else {}
    for entry in container["env"]:
        given[entry["name"]] = (
            entry.get("value") or {"status.podIP": LOOPBACK}[entry["valueFrom"]["fieldRef"]["fieldPath"]]
        )
    given = {name: re.sub(r"\$\((\w+)\)", lambda m: filled[m[1]], value) for name, value in given.items()}
    places = {
        "HOME": str(folder),
        "LOWBIT_DIR": str(checkpoint),
        "LOWBIT_HOST": LOOPBACK,
        "LOWBIT_PORT": str(port),
    }
    here = {name: value for name, value in places.items() if name in given}
    return {"PATH": os.environ["PATH"]} | given | here


def helm_test(resources: dict[str, Resource], pod: Pod, folder: Path) -> str:
    """Run the chart's test pod against a pod; returns what it printed, its status is 0."""
    (container,) = resources["Pod"]["spec"]["containers"]
    arguments = [
        f"--target={pod.url}" if word.startswith("--target=") else word for word in container["args"]
    ]
    environment = container_environment(resources, container, Path(), 0, folder, {})
    done = subprocess.run(
        [*LOWBIT, *arguments], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout

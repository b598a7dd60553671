"""The chart's quantize Job: what it is asked to do, by how many ranks, and by whose recipe."""

import pytest
import yaml
from tests.helm.chart import CHART, parse, pod, render, settings

from lowbit_quantize.cli import command as quantize
from lowbit_quantize.recipe import bundled_recipes


def test_quantize_job_writes_what_the_server_waits_for() -> None:
    resources = render("one-gpu")
    (job,) = resources["Job"]["spec"]["template"]["spec"]["containers"]
    name, *arguments = job["args"]
    assert name == "quantize"
    asked = parse(quantize, arguments)
    assert str(asked.out) == settings(resources)["LOWBIT_DIR"]
    assert (asked.model, asked.recipe, asked.set) == (
        "Qwen/Qwen3-8B@main",
        "awq",
        ["quality.max_mean_kld=0.1"],
    )
    (waiting,) = pod(resources)["initContainers"]
    assert "$LOWBIT_DIR/lowbit.json" in waiting["command"][-1]
    assert {"name": "HF_HUB_OFFLINE", "value": "0"} in job["env"]


@pytest.mark.parametrize(("ranks", "flags"), [(1, []), (4, ["--ranks=4"])])
def test_a_quantize_job_shares_its_work_among_ranks(ranks: int, flags: list[str]) -> None:
    resources = render("one-gpu", quantize={"ranks": ranks})
    (job,) = resources["Job"]["spec"]["template"]["spec"]["containers"]
    assert [argument for argument in job["args"] if argument.startswith("--ranks")] == flags
    assert parse(quantize, job["args"][1:]).ranks == ranks


def test_pods_of_one_job_are_its_ranks_and_meet_at_the_first() -> None:
    resources = render("one-gpu", quantize={"pods": 3})
    job = resources["Job"]["spec"]
    assert (job["completionMode"], job["completions"], job["parallelism"]) == ("Indexed", 3, 3)
    spec = job["template"]["spec"]
    (container,) = spec["containers"]
    told = {one["name"]: one for one in container["env"]}
    assert told["WORLD_SIZE"]["value"] == "3"
    assert "job-completion-index" in told["RANK"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert told["MASTER_ADDR"]["value"] == f"$(JOB_NAME)-0.{spec['subdomain']}"
    assert parse(quantize, container["args"][1:]).ranks == 1
    peers = resources["Peers"]
    assert (peers["metadata"]["name"], peers["spec"]["clusterIP"]) == (spec["subdomain"], "None")
    labels = job["template"]["metadata"]["labels"].items()
    assert peers["spec"]["selector"].items() <= labels
    between = resources["RanksPolicy"]["spec"]
    assert between["podSelector"]["matchLabels"].items() <= labels
    assert (
        between["ingress"][0]["from"]
        == between["egress"][0]["to"]
        == [{"podSelector": between["podSelector"]}]
    )
    names = list(told)
    assert names.index("JOB_NAME") < names.index("MASTER_ADDR")  # Kubernetes expands what stands before


def test_one_pod_needs_no_names_of_others() -> None:
    resources = render("one-gpu")
    job = resources["Job"]["spec"]
    assert not resources.keys() & {"Peers", "RanksPolicy"}
    assert "completionMode" not in job
    assert "subdomain" not in job["template"]["spec"]


def test_ranks_and_pods_are_one_or_the_other() -> None:
    with pytest.raises(Exception, match="each of several pods is one rank"):
        render("one-gpu", quantize={"pods": 2, "ranks": 2})


def test_another_recipe_is_another_job() -> None:
    names = {
        render("one-gpu", quantize={"recipe": r})["Job"]["metadata"]["name"] for r in ("awq", "gptq-g64")
    }
    assert len(names) == 2


def test_a_quantize_job_takes_a_plans_recipe_from_a_config_map() -> None:
    resources = render("one-gpu", quantize={"recipeConfigMap": "planned"})
    spec = resources["Job"]["spec"]["template"]["spec"]
    (job,) = spec["containers"]
    asked = parse(quantize, job["args"][1:])
    (mounted,) = [mount for mount in job["volumeMounts"] if mount["name"] == "recipe"]
    assert (asked.recipe, mounted["readOnly"]) == (f"{mounted['mountPath']}/recipe.yaml", True)
    (volume,) = [volume for volume in spec["volumes"] if volume["name"] == "recipe"]
    assert volume["configMap"] == {"name": "planned"}
    assert resources["Job"]["metadata"]["name"] != render("one-gpu")["Job"]["metadata"]["name"]


def test_schema_knows_the_bundled_recipes() -> None:
    schema = yaml.safe_load((CHART / "values.schema.json").read_text())
    assert schema["properties"]["quantize"]["properties"]["recipe"]["enum"] == sorted(bundled_recipes())

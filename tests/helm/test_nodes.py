"""One model over several nodes: the rendered LeaderWorkerSet, its leader and its followers."""

import re

from tests.helm.chart import Resource, parsed, render, settings, templates

GROUP: Resource = {
    "LWS_LEADER_ADDRESS": "demo-lowbit-nodes-0.demo-lowbit-nodes.models",
    "LWS_WORKER_INDEX": "1",
}


def expanded(environment: dict[str, str]) -> dict[str, str]:
    """As the kubelet expands $(NAME), with what a LeaderWorkerSet puts into a follower."""
    return {name: re.sub(r"\$\((\w+)\)", lambda m: GROUP[m[1]], text) for name, text in environment.items()}


def test_nodes_of_a_model_know_their_place_and_find_their_leader() -> None:
    config = parsed(expanded(settings(render("multi-node"))))
    assert (config.tensor_parallel_size, config.pipeline_parallel_size) == (4, 2)
    assert (config.nnodes, config.node_rank, config.master_port) == (2, 1, 29501)
    assert config.master_addr == GROUP["LWS_LEADER_ADDRESS"]
    group = render("multi-node")["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]
    assert group["size"] == 2
    assert group["restartPolicy"] == "RecreateGroupOnPodRestart"


def test_leader_and_followers_differ_in_nothing_but_what_answering_requests_takes() -> None:
    leader, follower = (template["spec"] for template in templates(render("multi-node")))
    (server,), (holder,) = leader.pop("containers"), follower.pop("containers")
    leader.pop("topologySpreadConstraints")
    assert leader == follower
    only_leaders = {"name", "ports", "startupProbe", "livenessProbe", "readinessProbe"}
    assert {key: value for key, value in server.items() if key not in only_leaders} == {
        key: value for key, value in holder.items() if key != "name"
    }
    assert only_leaders - holder.keys() == only_leaders - {"name"}


def test_requests_reach_leaders_only_and_nodes_reach_each_other_only() -> None:
    resources = render("multi-node")
    leader, follower = (template["metadata"]["labels"].items() for template in templates(resources))
    for selected in (
        resources["Service"]["spec"]["selector"],
        resources["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ):
        assert selected.items() <= leader
        assert not selected.items() <= follower
    policy = resources["NodesPolicy"]["spec"]
    nodes = policy["podSelector"]
    assert policy["ingress"] == [{"from": [{"podSelector": nodes}]}]
    assert policy["egress"][0] == {"to": [{"podSelector": nodes}]}
    assert {port["port"] for port in policy["egress"][1]["ports"]} == {53}
    assert nodes == resources["PodDisruptionBudget"]["spec"]["selector"]
    (components,) = nodes["matchExpressions"]
    assert components["values"] == [dict(side)["app.kubernetes.io/component"] for side in (leader, follower)]


def test_a_group_is_named_apart_from_the_service_and_scaled_as_a_whole() -> None:
    # A LeaderWorkerSet makes a headless Service of its own name.
    resources = render("multi-node", autoscaling={"mode": "hpa"})
    workload = resources["LeaderWorkerSet"]
    assert workload["metadata"]["name"] != resources["Service"]["metadata"]["name"]
    assert "replicas" not in workload["spec"]
    for target, scaled in (
        (resources["HorizontalPodAutoscaler"], workload),
        (render("autoscaled")["ScaledObject"], render("autoscaled")["Deployment"]),
    ):
        assert target["spec"]["scaleTargetRef"] == {
            "apiVersion": scaled["apiVersion"],
            "kind": scaled["kind"],
            "name": scaled["metadata"]["name"],
        }


def test_pipeline_parallel_inside_one_node_stays_a_deployment() -> None:
    resources = render("four-gpus", parallel={"tensorSize": 2, "pipelineSize": 2})
    assert "LeaderWorkerSet" not in resources
    config = parsed(settings(resources))
    assert (config.tensor_parallel_size, config.pipeline_parallel_size, config.nnodes) == (2, 2, 1)

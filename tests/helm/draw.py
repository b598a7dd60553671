"""Values drawn from the chart's schema.

hypothesis-jsonschema would do it, but its last release (0.23.1) does not run with hypothesis 6.170: its objects use an
internal that is gone. Of JSON Schema the chart needs only this much.
"""

import json
from collections.abc import Callable
from typing import Any

import jsonschema
from hypothesis import strategies as st
from tests.helm.chart import CHART, Resource

Strategy = st.SearchStrategy[Any]
SCHEMA: Resource = json.loads((CHART / "values.schema.json").read_text())
# For what the chart hands on unread, a few that Kubernetes takes; some meet a name of the chart, or each other.
HANDED_ON: dict[str, list[Any]] = {
    "affinity": [{}, {"nodeAffinity": {}}],
    "extraVolumes/items": [{"name": name, "configMap": {"name": "ca"}} for name in ("ca", "cache", "more")],
    "extraVolumeMounts/items": [
        {"name": n, "mountPath": p} for n, p in (("ca", "/ca"), ("more", "/ca/"), ("tmp", "/tmp"))
    ],
    "containers/items": [{"name": name, "image": "proxy:1"} for name in ("proxy", "server", "agent")],
    "resourceClaims/items": [{"name": n, "resourceClaimTemplateName": "gpus"} for n in ("gpu", "nic")],
    "valueFrom": [
        {"secretKeyRef": {"name": "s", "key": "k"}},
        {"fieldRef": {"fieldPath": "spec.nodeName"}},
    ],
    "triggers/items": [{"type": "cron", "metadata": {"timezone": "UTC"}}],
    "podSelector": [{}, {"matchLabels": {"a": "b"}}],
    "namespaceSelector": [{}, {"matchLabels": {"a": "b"}}],
    "ipBlock": [{"cidr": "10.0.0.0/8"}],
    "egress/items": [{}, {"ports": [{"port": 4317}]}],
    "jobsEgress/items": [{}, {"ports": [{"port": 3128}]}],
    "tlsConfig": [{}, {"insecureSkipVerify": True}],
    "global": [{}, {"imageRegistry": "mirror.example.org:5000"}, {"imagePullSecrets": ["a", {"name": "b"}]}],
}


def changes() -> dict[str, Strategy]:
    """For each key at the top, what may lie over the value of an example."""
    return {key: _drawn(node, f"/{key}", whole=False) for key, node in SCHEMA["properties"].items()}


def _drawn(node: Resource, path: str, whole: bool) -> Strategy:
    """`whole`: in a list nothing lies below, so all that is required is there."""
    for end, choices in HANDED_ON.items():
        if path.endswith(f"/{end}"):
            return st.sampled_from(choices)
    if "$ref" in node:
        name = node["$ref"].removeprefix("#/$defs/")
        return _drawn(SCHEMA["$defs"][name], f"{path}/{name}", whole)
    if "enum" in node:
        return st.sampled_from(node["enum"])
    if "anyOf" in node and "type" not in node:
        return st.one_of([_drawn(one, path, whole) for one in node["anyOf"]])
    kinds = node.get("type", "string")
    draws = [KINDS[kind](node, path, whole) for kind in ([kinds] if isinstance(kinds, str) else kinds)]
    return st.one_of(draws)


def _object(node: Resource, path: str, whole: bool) -> Strategy:
    below = {
        key: _drawn(one, f"{path}/{key}", whole=whole) for key, one in node.get("properties", {}).items()
    }
    required = node.get("required", []) if whole else []
    fixed = st.fixed_dictionaries(
        {key: below[key] for key in required},
        optional={key: one for key, one in below.items() if key not in required},
    )
    more = [
        _map(st.from_regex(pattern, fullmatch=True), _drawn(one, f"{path}/*", whole))
        for pattern, one in node.get("patternProperties", {}).items()
    ]
    return st.tuples(fixed, *more).map(
        lambda maps: {key: value for one in maps for key, value in one.items()}
    )


def _map(keys: Strategy, values: Strategy) -> Strategy:
    return st.dictionaries(keys, values, max_size=2)


def _array(node: Resource, path: str, whole: bool) -> Strategy:
    items = _drawn(node["items"], f"{path}/items", whole=True)
    return st.lists(items, min_size=node.get("minItems", 0), max_size=min(3, node.get("maxItems", 3)))


def _string(node: Resource, path: str, whole: bool) -> Strategy:
    pattern = node.get("pattern") or next((one["pattern"] for one in _parts(node) if "pattern" in one), None)
    text = (
        st.from_regex(pattern, fullmatch=True)
        if pattern
        else st.text(st.characters(codec="utf-8"), max_size=20)
    )
    resolver = {"$defs": SCHEMA["$defs"], **node}
    return text.filter(jsonschema.Draft202012Validator(resolver).is_valid)


def _parts(node: Resource) -> list[Resource]:
    named = [
        SCHEMA["$defs"][one["$ref"].removeprefix("#/$defs/")]
        for one in node.get("allOf", [])
        if "$ref" in one
    ]
    return [*node.get("allOf", []), *named]


def _integer(node: Resource, path: str, whole: bool) -> Strategy:
    return st.integers(node.get("minimum", -(1 << 31)), int(node.get("maximum", (1 << 31) - 1)))


def _number(node: Resource, path: str, whole: bool) -> Strategy:
    low, high = node.get("minimum", 0.001), node.get("maximum", node.get("exclusiveMaximum", 1.0) - 0.001)
    return st.floats(low, high, allow_nan=False)


KINDS: dict[str, Callable[[Resource, str, bool], Strategy]] = {
    "object": _object,
    "array": _array,
    "string": _string,
    "integer": _integer,
    "number": _number,
    "boolean": lambda node, path, whole: st.booleans(),
    "null": lambda node, path, whole: st.none(),
}

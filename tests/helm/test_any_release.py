"""Any release name and any values that the schema allows: they render to what Kubernetes takes, or are refused plainly.

`LOWBIT_CHART_EXAMPLES=200 pytest tests/helm/test_any_release.py` draws 200 new ones; a plain run the same few.
"""

import copy
import os

import helm_python
import jsonschema
import kubernetes_validate
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tests.helm.chart import EXAMPLES, Resource, merged, release
from tests.helm.draw import changes
from tests.helm.kubernetes_rules import faults
from tests.helm.test_valid import CRDS

GIVEN = os.environ.get("LOWBIT_CHART_EXAMPLES")
COUNT = int(GIVEN or 40)
CHANGES = changes()
NAMES = st.one_of(
    st.sampled_from(["llama-3.1", "70b-chat", "123", "true", "null", "1e3", "lowbit", "lowbit-a", "a" * 53]),
    st.from_regex(
        r"[a-z0-9]([-a-z0-9]{0,20}[a-z0-9])?(\.[a-z0-9]([-a-z0-9]{0,25}[a-z0-9])?)?", fullmatch=True
    ),
)


@st.composite
def releases(draw: st.DrawFn) -> tuple[str, str, Resource]:
    """A release name, a namespace, and an example with up to five of its keys changed."""
    values = EXAMPLES[draw(st.sampled_from(sorted(EXAMPLES)))]
    keys = draw(st.lists(st.sampled_from(sorted(CHANGES)), min_size=1, max_size=5, unique=True))
    for key in keys:
        values = merged(values, {key: draw(CHANGES[key])})
    namespace = draw(st.sampled_from(["models", "123", "true", "n" * 63]))
    return draw(NAMES)[:53].rstrip("-."), namespace, copy.deepcopy(values)


def outcome(name: str, namespace: str, values: Resource) -> str:
    """`rendered` and valid, or `refused` by the schema or by a message of the templates."""
    try:
        resources = release(values, name, namespace)
    except helm_python.HelmValuesError:
        return "refused"
    except helm_python.HelmError as error:
        if "execution error at" not in str(error):
            raise  # a template that stumbled, or that wrote no YAML
        return "refused"
    assert faults(resources) == []
    for kind, resource in resources.items():
        if kind in CRDS:
            jsonschema.Draft202012Validator(CRDS[kind]).validate(resource)
        else:
            kubernetes_validate.validate(resource, "1.37", strict=True)
    return "rendered"


def test_any_release_renders_to_what_kubernetes_takes_or_is_refused() -> None:
    outcomes: list[str] = []

    @settings(
        max_examples=COUNT,
        deadline=None,
        database=None,
        derandomize=not GIVEN,
        phases=[Phase.generate],  # to make a failing release smaller takes minutes
        suppress_health_check=list(HealthCheck),
    )
    @given(releases())
    def draw(drawn: tuple[str, str, Resource]) -> None:
        outcomes.append(outcome(*drawn))

    draw()
    print(
        f"{len(outcomes)} drawn, {outcomes.count('rendered')} rendered, {outcomes.count('refused')} refused"
    )
    assert min(outcomes.count("rendered"), outcomes.count("refused")) >= COUNT // 8

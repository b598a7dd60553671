"""A recipe's rules, read for the linears of a model: the last rule that matches a linear decides."""

import fnmatch
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType

import torch

from lowbit_core.documents import parse_document
from lowbit_core.errors import RecipeError
from lowbit_quantize.catalog import Catalog, unknown_name
from lowbit_quantize.methods.compensate import Compensate
from lowbit_quantize.methods.method import Method
from lowbit_quantize.methods.pruner import Pruner
from lowbit_quantize.recipe import NONE, MethodStep, Rule
from lowbit_quantize.schemes.dense import Dense
from lowbit_quantize.schemes.scheme import Preset, Scheme
from lowbit_quantize.walk.module_plan import ModulePlan

CHANGES_WEIGHTS = (Pruner, Compensate)  # methods that do so where nothing is quantized
DEFAULT_METHODS = (MethodStep.model_validate("awq"),)


@dataclass(frozen=True)
class Wanted:
    """What the rules want of a linear: its entry, or None to leave it; and whether a rule says so, or none matches."""

    entry: ModulePlan | None = None
    by_rule: bool = False

    @property
    def left_because(self) -> str:
        """Why it has no entry, where it has none."""
        return "a rule gives it the scheme none" if self.by_rule else "no rule matches it"

    @property
    def words(self) -> str:
        if self.entry is None:
            return NONE
        size = self.entry.scheme.group_size or "channel"
        return f"{self.entry.scheme.name}, group_size {size}, {[_words(method) for method in self.entry.methods]}"


def resolve(
    rules: Sequence[Rule],
    published: Mapping[str, str],
    linears: Collection[str],
    catalog: Catalog,
    on_request: Collection[str] = (),
    fixed: Mapping[str, str] = MappingProxyType({}),
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Wanted]:
    """What the rules want of each of `linears` and of those `on_request`, by name; raises RecipeError.

    `published` maps the names of all matrices of the model, which are more, to those that rules are written in.
    `on_request` is the head: a pattern that means the decoder's linears (`*`) does not mean it, only one that matches
    none of these; `none` always does. `fixed` says why others stay as they are. `dtype` is what is not quantized has.
    """
    wanted = dict.fromkeys([*linears, *on_request], Wanted())
    for number, rule in enumerate(rules):
        entry = _entry(rule, f"modules.{number}", catalog, dtype)
        for pattern in rule.match:
            matches = _matcher(pattern, f"modules.{number}.match")
            matched = [name for name, known in published.items() if matches(known)]
            if not matched:
                example = published[list(linears)[-1]]
                raise RecipeError(
                    f"modules.{number}.match: {pattern!r} matches no linear; names look like {example}, patterns like "
                    "'*.down_proj' or 're:.*down_proj'"
                )
            mine = [name for name in matched if name in wanted]
            if entry is not None:
                mine = [name for name in mine if name not in on_request] or mine
            if entry is not None and not mine:
                why = fixed.get(matched[0], "is none of the decoder's linears and stays as it is")
                raise RecipeError(
                    f"modules.{number}.match: {pattern!r} matches {published[matched[0]]} only, which {why}; give it "
                    "scheme: none or leave the rule out"
                )
            wanted.update(dict.fromkeys(mine, Wanted(entry, by_rule=True)))
    return wanted


def _matcher(pattern: str, key: str) -> Callable[[str], object]:
    """`re:` matches from the start of a name on, as compressed-tensors, transformers and vLLM read it."""
    expression = pattern.removeprefix("re:") if pattern.startswith("re:") else fnmatch.translate(pattern)
    try:
        return re.compile(expression).match
    except re.error as error:
        raise RecipeError(f"{key}: {pattern!r} is not a regular expression: {error}") from error


def _entry(rule: Rule, key: str, catalog: Catalog, dtype: torch.dtype) -> ModulePlan | None:
    if rule.scheme == NONE:
        return _plain_entry(rule, f"{key}.methods", catalog, dtype)
    presets = {preset.name: preset for preset in catalog.presets}
    if rule.scheme not in presets:
        method = next((one.name for one in catalog.methods if one.name == rule.scheme.casefold()), None)
        hint = f"; {method} is a method: methods: [{method}]" if method else ""
        raise RecipeError(unknown_name(f"{key}.scheme", rule.scheme, [*presets, NONE]) + hint)
    preset = presets[rule.scheme]
    if preset.fixed_size and rule.group_size not in (None, preset.group_size):
        raise RecipeError(
            f"{key}.group_size = {rule.group_size}: {rule.scheme} has {_scales(preset)}; leave group_size out"
        )
    scheme: Scheme = preset.make(rule.group_size or preset.group_size)
    return ModulePlan(scheme, _methods(rule.methods or DEFAULT_METHODS, f"{key}.methods", catalog))


def _plain_entry(rule: Rule, key: str, catalog: Catalog, dtype: torch.dtype) -> ModulePlan | None:
    """What is not quantized stays as it is, unless a method changes it all the same."""
    if not rule.methods:
        return None
    methods = _methods(rule.methods, key, catalog)
    if len(methods) > 1 or not isinstance(methods[0], CHANGES_WEIGHTS):
        able = _names(one for one in catalog.methods if isinstance(one, CHANGES_WEIGHTS))
        raise RecipeError(
            f"{key} = {_names(methods)}: scheme none quantizes nothing, so one method that changes weights all the "
            f"same may go with it ({', '.join(able)}) and no other; leave methods out, or give another scheme"
        )
    return ModulePlan(Dense(dtype), methods)


def _words(method: Method) -> str:
    return f"{method.name} {method.sparsity}" if isinstance(method, Pruner) else method.name


def _names(methods: Iterable[Method]) -> list[str]:
    return [method.name for method in methods]


def _scales(preset: Preset) -> str:
    """What a preset of one group size alone has."""
    if preset.group_size == "channel":
        return "one scale a channel or tensor"
    return f"groups of {preset.group_size} inputs and no others"


def _methods(steps: Sequence[MethodStep], key: str, catalog: Catalog) -> tuple[Method, ...]:
    known = {method.name: method for method in catalog.methods}
    for step in steps:
        if step.name not in known:
            raise RecipeError(unknown_name(key, step.name, known))
    methods = tuple(_with_options(known[step.name], step, key) for step in steps)
    names = _names(methods)
    if len(set(names)) < len(names):
        raise RecipeError(f"{key} = {names}: a method stands twice; name each once")
    for method in methods[:-1]:
        if not method.scales_inputs and not isinstance(method, Pruner):
            raise RecipeError(
                f"{key} = {names}: {method.name} only quantizes, so it stands last; put it there or leave it out"
            )
    _check_pruners(methods, key)
    return methods


def _with_options(method: Method, step: MethodStep, key: str) -> Method:
    if isinstance(method, Pruner):
        options = parse_document(
            "recipe", step.options, f"{key}.{step.name}", method.options, error=RecipeError
        )
        return method.with_options(options)
    if step.options:
        raise RecipeError(f"{key}: {step.name} has no options; write its name alone")
    return method


def _check_pruners(methods: Sequence[Method], key: str) -> None:
    """One mask at most, chosen for weights as they will be multiplied: behind all that scales inputs."""
    names, places = _names(methods), [place for place, one in enumerate(methods) if isinstance(one, Pruner)]
    if len(places) > 1:
        raise RecipeError(
            f"{key} = {names}: {' and '.join(names[place] for place in places)} each choose the weights that become "
            "zero; name one"
        )
    after = methods[places[0] + 1 :] if places else ()
    scaling = next((one for one in after if one.scales_inputs), None)
    if scaling is not None:
        scalers, others = (
            [one for one in methods if one.scales_inputs is wanted] for wanted in (True, False)
        )
        raise RecipeError(
            f"{key} = {names}: {scaling.name} scales inputs, and {names[places[0]]} chooses its mask for weights as "
            f"they are multiplied; write [{', '.join(_names(chain(scalers, others)))}]"
        )

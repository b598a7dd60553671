"""`lowbit plan`: targets in, a recipe out; the last line of stdout is JSON. Exit status 1 where nothing fits."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit_core.cli import Command, file_path
from lowbit_core.errors import ConfigError
from lowbit_core.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lowbit_plan.candidates import Candidate, Structure
    from lowbit_plan.latency import Speeds
    from lowbit_plan.place import Place
    from lowbit_plan.targets import Targets
    from lowbit_plan.verdict import Verdict
    from lowbit_quantize.model.reference import ModelReference
    from lowbit_quantize.plan import Plan

NOTHING_FITS = 1
PROMPT = 1024
log = get_logger("plan")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="as --model of lowbit quantize")
    _add_targets(parser.add_argument_group("targets"))
    place = parser.add_argument_group("where")
    place.add_argument(
        "--on", default="cpu", metavar="CARD", help="cpu, which is measured, or a card: H100, L4, …"
    )
    place.add_argument(
        "--profile", type=file_path, metavar="FILE", help="that keeps what was measured of this CPU"
    )
    place.add_argument(
        "--price-per-hour", type=float, metavar="N", help="of the machine: adds what tokens cost"
    )
    choice = parser.add_argument_group("candidates")
    choice.add_argument(
        "--schemes", metavar="NAME,…", help="some of those that the processor runs; bf16 is one"
    )
    choice.add_argument(
        "--kv-cache", choices=("auto", "none", "fp8"), default="auto", help="default auto: either"
    )
    choice.add_argument(
        "--sensitivity",
        type=file_path,
        metavar="FILE",
        help="by lowbit sensitivity: layers may differ, KL is predicted",
    )
    choice.add_argument(
        "--structure",
        action="store_true",
        help="where bits alone do not fit, try fewer layers and channels too, which loses much more",
    )
    parser.add_argument("--out", type=file_path, metavar="FILE.yaml", help="the recipe, a new file")
    parser.add_argument(
        "--run",
        type=file_path,
        metavar="DIR",
        help="make, serve and load-test it; checkpoint and report go there",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="with --run: as of lowbit quantize"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="as of lowbit quantize")


def _add_targets(targets: argparse._ArgumentGroup) -> None:
    targets.add_argument(
        "--context", type=int, metavar="N", help="tokens kept of each stream, prompt and output"
    )
    targets.add_argument(
        "--streams", type=int, default=1, metavar="N", help="that generate at once (default 1)"
    )
    targets.add_argument(
        "--fit", metavar="SIZE", help="8GiB: for weights, cache and runtime (default: the card's)"
    )
    targets.add_argument("--itl-ms", type=float, metavar="N", help="between two tokens of a stream")
    targets.add_argument(
        "--ttft-ms", type=float, metavar="N", help="to the first token, where nothing else runs"
    )
    targets.add_argument(
        "--prompt",
        type=int,
        metavar="N",
        help=f"tokens of the prompt of --ttft-ms (default {PROMPT}, or half of the context)",
    )
    targets.add_argument("--max-kld", type=float, metavar="N", help="nats a token; needs --sensitivity")


def _run(arguments: argparse.Namespace) -> int:
    _check_flags(arguments)
    try:
        import torch  # noqa: F401
    except ImportError:
        raise ConfigError(
            "`lowbit plan` needs torch and transformers; run `pip install 'lowbit[cpu]'` or [gpu]"
        ) from None
    from rich.console import Console

    from lowbit_plan.place import find_place
    from lowbit_plan.recipe_file import check_out, recipe_text
    from lowbit_plan.report import document, one_line, table
    from lowbit_plan.targets import check_targets
    from lowbit_quantize.model.reference import find_model

    place = find_place(arguments.on)
    if arguments.out is not None:
        check_out(arguments.out)
    reference = find_model(arguments.model, trust_remote_code=arguments.trust_remote_code)
    targets = _targets(arguments, place)
    check_targets(targets, getattr(reference.config.get_text_config(), "max_position_embeddings", None))
    met, missed = _judged(arguments, reference, place, targets)
    closeness = _closeness(arguments, met)
    Console(file=sys.stderr).print(table(met, missed, targets))
    if not met and not arguments.structure and arguments.sensitivity is None:
        sys.stderr.write("with --structure fewer layers and channels are tried too\n")
    report = document(
        reference.name,
        place,
        targets,
        met,
        missed,
        closeness=closeness,
        price_per_hour=arguments.price_per_hour,
    )
    report["line"] = one_line(reference.name, met, missed)
    sys.stderr.write(f"{report['line']}\n")
    if met and arguments.out is not None:
        arguments.out.write_text(
            recipe_text(reference.name, met[0], targets, place, closeness=closeness), encoding="utf-8"
        )
        report["recipe"] = str(arguments.out)
    if met and arguments.run is not None:
        report["run"] = _verified(arguments, met[0], targets, place, closeness)
    sys.stdout.write(json.dumps(report) + "\n")
    return 0 if met else NOTHING_FITS


def _check_flags(arguments: argparse.Namespace) -> None:
    on_cpu = arguments.on.casefold() == "cpu"
    if arguments.context is None:
        raise ConfigError(
            "give --context N, the tokens that are kept of a conversation: memory hangs on it, and no default is right"
        )
    if arguments.fit is None and on_cpu:
        raise ConfigError("give --fit SIZE, the memory for weights, cache and runtime, such as --fit 8GiB")
    if arguments.max_kld is not None and arguments.sensitivity is None:
        raise ConfigError(
            "--max-kld needs a prediction of KL for this model: give --sensitivity FILE, by lowbit sensitivity, "
            "or leave --max-kld out and bound the run by --set quality.max_mean_kld"
        )
    if arguments.run is not None and not on_cpu:
        raise ConfigError(
            f"--run serves on this machine, and the plan is for {arguments.on}; leave one of them out"
        )
    if arguments.sensitivity is not None and (arguments.schemes or arguments.kv_cache != "auto"):
        raise ConfigError(
            "--sensitivity has its own candidates and caches; leave out --schemes and --kv-cache, or give other "
            "--candidates to lowbit sensitivity"
        )
    if arguments.structure and arguments.sensitivity is not None:
        raise ConfigError("--structure: --sensitivity is of the whole model; leave one of them out")
    if arguments.set and arguments.run is None:
        raise ConfigError(
            "--set overrides keys of the recipe that --run makes; give --run, or edit the recipe"
        )
    if arguments.price_per_hour is not None and not arguments.price_per_hour > 0:
        raise ConfigError(f"--price-per-hour {arguments.price_per_hour:g}: allowed is a number above 0")
    if arguments.profile is not None and not on_cpu:
        raise ConfigError("--profile keeps what was measured of this CPU; it goes with --on cpu")


def _targets(arguments: argparse.Namespace, place: "Place") -> "Targets":
    from lowbit_plan.targets import Targets, size_of

    card = place.card.memory if place.card else None
    fit = card if arguments.fit is None else size_of("--fit", arguments.fit)
    assert fit is not None
    if card is not None and fit > card:
        raise ConfigError(
            f"--fit {arguments.fit}: {place.name} has {card / 2**30:.1f} GiB; give less, or leave it out"
        )
    prompt = min(PROMPT, max(2, arguments.context // 2)) if arguments.prompt is None else arguments.prompt
    return Targets(
        fit, arguments.context, arguments.streams, prompt,
        None if arguments.itl_ms is None else arguments.itl_ms / 1e3,
        None if arguments.ttft_ms is None else arguments.ttft_ms / 1e3,
        arguments.max_kld,
    )  # fmt: skip


def _judged(
    arguments: argparse.Namespace, reference: "ModelReference", place: "Place", targets: "Targets"
) -> "tuple[list[Verdict], list[Verdict]]":
    """Candidates that meet all targets, and the others: of the whole model, then if asked for of less structure."""
    from lowbit_plan.candidates import WHOLE, structures
    from lowbit_plan.verdict import judge, sorted_by_fit

    verdicts: list[Verdict] = []
    for of in ([WHOLE], structures()) if arguments.structure else ([WHOLE],):
        found, speeds = _candidates(arguments, reference, place, targets, of)
        verdicts += [judge(one, place, speeds, targets) for one in found]
        if any(one.met for one in verdicts):
            break
    return sorted_by_fit(verdicts)


def _candidates(
    arguments: argparse.Namespace,
    reference: "ModelReference",
    place: "Place",
    targets: "Targets",
    of: "Sequence[Structure]",
) -> "tuple[list[Candidate], Speeds]":
    """One scheme everywhere, in the order of what is known; or with sensitivities their schemes and the best mix."""
    if arguments.sensitivity is None:
        from lowbit_plan.candidates import candidates

        schemes = [one.strip() for one in arguments.schemes.split(",")] if arguments.schemes else None
        fp8 = {"auto": None, "none": False, "fp8": True}[arguments.kv_cache]
        found = candidates(reference, place, schemes, fp8_cache=fp8, of=of)
        return found, _speeds(arguments, reference, place, targets, [one.plan for one in found])
    from lowbit_plan.program import choices, mixed, plans_of
    from lowbit_quantize.sensitivity.report import read_sensitivity

    known = choices(reference, place, read_sensitivity(arguments.sensitivity))
    speeds = _speeds(arguments, reference, place, targets, plans_of(reference, place, known))
    return list(mixed(reference, place, targets, speeds, known)), speeds


def _speeds(
    arguments: argparse.Namespace,
    reference: "ModelReference",
    place: "Place",
    targets: "Targets",
    plans: "Sequence[Plan]",
) -> "Speeds":
    """The card's, or this machine's, measured as far as they are not known."""
    if place.card is not None:
        return place.card
    from lowbit_plan.latency import predicted
    from lowbit_plan.profile import Measured, Wishes, load_profile
    from lowbit_plan.twin import add_beside
    from lowbit_plan.work import work_of

    profile, wishes = load_profile(arguments.profile), Wishes()
    for one in plans:
        predicted(work_of(one), wishes, targets)
    return Measured(profile, add_beside(profile, reference, targets, wishes))


def _closeness(arguments: argparse.Namespace, met: "Sequence[Verdict]") -> str:
    from lowbit_plan.candidates import known_kl

    if arguments.sensitivity is not None:
        return f"KL is predicted from {arguments.sensitivity.name}, by lowbit sensitivity."
    said = (
        f"Candidates are ordered by the KL that was measured of {known_kl()['model']}; of this model none is predicted "
        "(lowbit sensitivity does that)."
    )
    if met and met[0].candidate.structure:
        said += " What lost structure is usually to be trained again before it serves (lowbit distill)."
    return said


def _verified(
    arguments: argparse.Namespace,
    chosen: "Verdict",
    targets: "Targets",
    place: "Place",
    closeness: str,
) -> dict[str, Any]:
    from lowbit_plan.verify import verify

    return verify(
        arguments.model,
        chosen,
        targets,
        place,
        Path(arguments.run),
        closeness=closeness,
        overrides=arguments.set,
    )


command = Command(
    "Find the scheme that meets targets of memory, latency and KL; writes a recipe.", _add_arguments, _run
)

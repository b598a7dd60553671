"""Whatever a chat template or a tokenizer does, the run ends as tokens or in one line that names the document."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_models import VOCABULARY, tiny_tokenizer

from lowbit_core.cli import main
from lowbit_core.errors import RecipeError
from lowbit_quantize.quality.dataset import load_texts
from lowbit_quantize.quality.document import Document
from lowbit_quantize.quality.templates import encode, render
from lowbit_quantize.recipe import Quality, Text

PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
SYSTEM = {"role": "system", "content": "Be brief"}
ASK = {"role": "user", "content": "Hi"}


def with_template(template: Any) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}{{ m.content + 3 }}{% endfor %}", "TypeError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ messages[9].content.upper() }}", "UndefinedError"),
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{{ range(10**9) | list }}", "OverflowError"),
        ("{{ raise_exception('no, not\n\nthis') }}", "TemplateError: 'no, not"),
        ("{{ messages | tojson | int('x') + messages }}", "Error"),
        ("{{ '\\ud83d' }}", "half of a surrogate pair"),
        (
            {"rag": PLAIN, "tool_use": PLAIN},
            "has the chat templates rag, tool_use and none is called default",
        ),
        ({}, "x"),
    ],
)
def test_a_template_that_raises_anything_is_refused_with_the_documents_place(
    template: Any, words: str
) -> None:
    document = Document("text", messages=(ASK,), place="chat.jsonl, line 7")
    if not template:  # no template at all: the words alone
        assert render(document, with_template(template)) == "Hi"
        return
    with pytest.raises(RecipeError) as caught:
        render(document, with_template(template))
    line = str(caught.value)
    assert line.startswith("text chat.jsonl, line 7: the model")
    assert words in line
    assert len(line) < 400
    assert "\n" not in line


def test_a_refused_system_message_is_told_by_its_line_and_where_to_put_it() -> None:
    refusing = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    )
    document = Document("text", messages=(SYSTEM, ASK), place="chat.jsonl, line 7")
    with pytest.raises(
        RecipeError, match=r"line 7: .*'System role not supported'; put the system message's text at"
    ):
        render(document, with_template(refusing + PLAIN))


def test_named_templates_are_chosen_as_transformers_does() -> None:
    plain = Document("text", messages=(ASK,))
    tools = Document("text", messages=(ASK,), tools=({"type": "function", "function": {"name": "f"}},))
    templates = {"default": "default", "tool_use": "{{ tools[0].function.name }}"}
    assert render(plain, with_template(templates)) == "default"
    assert render(tools, with_template(templates)) == "f"
    assert render(tools, with_template({"tool_use": "tools", "rag": "rag"})) == "tools"


def test_tools_and_calls_reach_the_template_as_objects(tmp_path: Path) -> None:
    template = "{% for call in messages[0].tool_calls %}{{ call.function.arguments.a }}{% endfor %}"
    call = {"function": {"name": "f", "arguments": '{"a": "seven"}'}}
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"messages": [{"role": "assistant", "content": None, "tool_calls": [call] * 60}]})
    )
    ours, _ = load_texts(
        Text(dataset=str(tmp_path / "a.jsonl"), num_samples=1, max_seq_length=32),
        Quality(num_samples=2, max_seq_length=32),
        with_template(template),
        VOCABULARY,
    )
    assert "sevenseven" in tiny_tokenizer().decode(ours.ids[0])


def test_a_tokenizer_that_raises_is_told_by_the_documents_place() -> None:
    class Broken:
        """A fake: a tokenizer that takes nothing."""

        chat_template = None
        eos_token_id = None

        def __call__(self, *_: Any, **__: Any) -> Any:
            raise ValueError("no\nsuch\npiece")

    with pytest.raises(
        RecipeError, match=r"text a\.txt, line 1: the model's tokenizer cannot read 'x': ValueError"
    ):
        encode(Document("text", text="x", place="a.txt, line 1"), Broken())


@pytest.mark.parametrize("template", ["{{ 1 // 0 }}", {"a": PLAIN, "b": PLAIN}])
def test_the_command_ends_with_status_2_and_the_line_of_the_file(
    tiny_model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], template: Any
) -> None:
    import shutil

    model = tmp_path / "m"
    shutil.copytree(tiny_model("llama"), model)
    (model / "chat_template.jinja").unlink(missing_ok=True)
    with_template(template).save_pretrained(model)
    file = tmp_path / "chat.jsonl"
    file.write_text("\n" + json.dumps({"messages": [ASK]}) + "\n")
    arguments = ["quantize", "--model", str(model), "--recipe", "rtn-g64", "--out", str(tmp_path / "out")]
    assert main([*arguments, f"--calibration={file}"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert "chat.jsonl, line 2: the model" in lines[-1]
    assert not (tmp_path / "out").exists()

"""From a document to tokens: the model's chat template and its tokenizer, each behind a check.

A template is a program by the model's author: whatever it raises ends as one line that names the document.
"""

from typing import Any

from lowbit_core.errors import RecipeError
from lowbit_core.text_file import half_character, quote
from lowbit_quantize.quality.document import Document


def is_conversation(document: Document, tokenizer: Any) -> bool:
    """Whether the model's chat template writes it."""
    return bool(document.messages and tokenizer.chat_template)


def render(document: Document, tokenizer: Any) -> str:
    """The text that the model reads; raises RecipeError where the template refuses."""
    if not is_conversation(document, tokenizer):
        return document.words
    tools = {"tools": list(document.tools)} if document.tools else {}
    _refuse_unnamed(tokenizer.chat_template, document)
    try:
        text = str(tokenizer.apply_chat_template(list(document.messages), tokenize=False, **tools))
    except Exception as error:  # a template may raise anything
        raise RecipeError(
            f"text {document.place}: the model's chat template refuses this conversation: "
            f"{type(error).__name__}: {quote(str(error))}; {_advice(document, str(error))}"
        ) from error
    if half := half_character(text):
        raise RecipeError(
            f"text {document.place}: the model's chat template writes half of a surrogate pair: {half}; "
            "mend the template, or give plain text"
        )
    return text


def encode(document: Document, tokenizer: Any) -> list[int]:
    """Token ids, with the special tokens that the tokenizer adds to plain text; a template writes its own."""
    text, conversation = render(document, tokenizer), is_conversation(document, tokenizer)
    try:
        tokens: list[int] = tokenizer(text, add_special_tokens=not conversation)["input_ids"]
    except Exception as error:  # whatever a tokenizer raises of text that is well formed
        raise RecipeError(
            f"text {document.place}: the model's tokenizer cannot read {quote(text)}: "
            f"{type(error).__name__}: {quote(str(error))}; leave this document out"
        ) from error
    return tokens if conversation or tokenizer.eos_token_id is None else [*tokens, tokenizer.eos_token_id]


def _refuse_unnamed(templates: Any, document: Document) -> None:
    """Several templates of which none is the default: nobody says which one a conversation takes."""
    if not isinstance(templates, dict) or "default" in templates:
        return
    if not (document.tools and "tool_use" in templates):
        raise RecipeError(
            f"text {document.place}: the model has the chat templates {', '.join(sorted(templates))} and none is "
            "called default; save one of them as chat_template.jinja in the model's directory, or give plain text"
        )


def _advice(document: Document, reason: str) -> str:
    has_system = any(message["role"] == "system" for message in document.messages)
    if has_system and "system" in reason.lower():
        return "put the system message's text at the start of the first user message, as the endpoint's users must"
    return "change or leave out the conversation, mend the template, or give plain text"

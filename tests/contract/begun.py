"""Which of vLLM's classes is made, on a processor that has no kernel for some of them."""

import inspect
from collections.abc import Callable
from typing import Any


def made_or_begun(make: Callable[[], Any]) -> Any:
    """What is made, or what was being made when vLLM found no kernel for it; the error where nothing was."""
    try:
        return make()
    except (ValueError, NotImplementedError) as error:
        frames = inspect.getinnerframes(error.__traceback__) if error.__traceback__ else []
        begun = [frame.frame.f_locals.get("self") for frame in frames if frame.function == "__init__"]
        return begun[0] if begun else error

"""What the matrix of families quotes of an engine that did not start."""

from benchmarks.families.served import MOST, last_error

MARKED = """
(EngineCore pid=12) ERROR 11-29 19:10:14 [core.py:1] Traceback (most recent call last):
(EngineCore pid=12) ERROR 11-29 19:10:14 [core.py:1]   File "cpu.py", line 1, in check
(EngineCore pid=12) ERROR 11-29 19:10:14 [core.py:1] NotImplementedError: Sparse Attention is not supported on CPU.
Exiting
"""
NOT_INSPECTED = """
ERROR 11-29 19:10:14 [registry.py:1] Error in inspecting model architecture 'SeesForConditionalGeneration'
ERROR 11-29 19:10:14 [registry.py:1] Traceback (most recent call last):
ERROR 11-29 19:10:14 [registry.py:1]   File "sees.py", line 26, in <module>
ERROR 11-29 19:10:14 [registry.py:1] ModuleNotFoundError: No module named 'pictures'
Traceback (most recent call last):
  File "greedy.py", line 1, in engine
pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
  Value error, Model architectures ['SeesForConditionalGeneration'] failed to be inspected. Please check the logs.
"""


def test_the_last_error_is_quoted_with_its_own_lines_and_without_marks() -> None:
    assert last_error(MARKED, 1) == "NotImplementedError: Sparse Attention is not supported on CPU. Exiting"
    assert last_error("ValueError: " + "x" * 2 * MOST, 1) == ("ValueError: " + "x" * MOST)[:MOST]


def test_an_error_that_sends_people_to_the_log_is_told_by_what_the_log_says() -> None:
    assert last_error(NOT_INSPECTED, 1) == "ModuleNotFoundError: No module named 'pictures'"
    alone = NOT_INSPECTED[NOT_INSPECTED.index("pydantic_core") :]
    assert last_error(alone, 1).endswith("failed to be inspected. Please check the logs.")


def test_without_an_error_the_last_line_is_quoted_or_the_status() -> None:
    assert last_error("loading\nkilled\n", -9) == "killed"
    assert last_error("", -9) == "ended with status -9 without a word"

"""Azure's LLM inference traces of 2023 and 2024: a table of times and lengths.

TIMESTAMP, ContextTokens, GeneratedTokens; times of 2023 have seven digits of a second, those of 2024 a zone. Patel et
al., Splitwise, 2023 (arXiv 2311.18677); Stojkovic et al., DynamoLLM, 2024 (arXiv 2408.00741).
"""

from datetime import UTC, datetime

from lowbit_core.text_file import quote
from lowbit_loadtest.generate.traces.recorded import Format, RecordedSession, RecordedTurn, Row


def _session(row: Row) -> RecordedSession:
    turn = RecordedTurn(
        prompt_tokens=row.tokens("ContextTokens"), output_tokens=row.tokens("GeneratedTokens")
    )
    return RecordedSession((turn,), _time_s(row))


def _time_s(row: Row) -> float:
    """A time without a zone is UTC; digits beyond a microsecond are left out."""
    text = str(row.get("TIMESTAMP") or "").strip()
    try:
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        words = f"{quote(text)} is given; allowed is a date and time such as 2024-05-10 00:00:00.009930+00:00"
        raise row.error("TIMESTAMP", words) from None


FORMAT = Format("azure", ("TIMESTAMP", "ContextTokens", "GeneratedTokens"), _session)

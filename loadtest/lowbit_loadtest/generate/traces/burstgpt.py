"""BurstGPT: a table of times in seconds and lengths; failed requests have no response tokens.

Timestamp, Model, Request tokens, Response tokens, Total tokens, Log Type; the third release adds Session ID and Elapsed
time, which say nothing of what prompts share. Wang et al., 2024 (arXiv 2401.17644).
"""

from lowbit_loadtest.generate.traces.recorded import Format, RecordedSession, RecordedTurn, Row


def _session(row: Row) -> RecordedSession:
    turn = RecordedTurn(
        prompt_tokens=row.tokens("Request tokens"), output_tokens=row.tokens("Response tokens")
    )
    return RecordedSession((turn,), row.seconds("Timestamp"))


FORMAT = Format("burstgpt", ("Timestamp", "Request tokens", "Response tokens"), _session)

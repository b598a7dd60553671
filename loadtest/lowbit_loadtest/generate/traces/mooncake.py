"""Mooncake's traces: times in milliseconds, lengths, and ids of the 512-token blocks of each prompt.

timestamp, input_length, output_length, hash_ids. Qin et al., 2024 (arXiv 2407.00079).
"""

from lowbit_loadtest.generate.traces.recorded import Format, RecordedSession, RecordedTurn, Row

BLOCK_TOKENS = 512


def _session(row: Row) -> RecordedSession:
    turn = RecordedTurn(
        prompt_tokens=row.tokens("input_length"),
        output_tokens=row.tokens("output_length"),
        blocks=row.blocks("hash_ids"),
        block_tokens=BLOCK_TOKENS,
    )
    return RecordedSession((turn,), row.seconds("timestamp") / 1000)


FORMAT = Format("mooncake", ("timestamp", "input_length", "output_length"), _session)

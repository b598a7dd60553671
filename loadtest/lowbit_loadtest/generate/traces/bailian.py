"""Alibaba's Qwen-Bailian traces: Mooncake's keys, but times in seconds and blocks of 16 tokens.

chat_id, parent_chat_id, timestamp, input_length, output_length, type, turn, hash_ids. Each request is sent at its own
recorded time; what it shares with the turns before it is in its blocks. Wang et al., 2025 (arXiv 2506.02634).
"""

from lowbit_loadtest.generate.traces.recorded import Format, RecordedSession, RecordedTurn, Row

BLOCK_TOKENS = 16


def _session(row: Row) -> RecordedSession:
    turn = RecordedTurn(
        prompt_tokens=row.tokens("input_length"),
        output_tokens=row.tokens("output_length"),
        blocks=row.blocks("hash_ids"),
        block_tokens=BLOCK_TOKENS,
    )
    return RecordedSession((turn,), row.seconds("timestamp"))


FORMAT = Format("bailian", ("chat_id", "timestamp", "input_length", "output_length"), _session)

"""How many tokens a KV cache of so many bytes holds in the CPU engine, and what its server takes beside it.

`lowbit serve` and `lowbit plan` count alike, by this file.
"""

GIB = 1 << 30
BLOCK_TOKENS = 128  # the CPU engine's block; a multiple of every GPU block size
CPU_RUNTIME_BYTES = GIB  # of the server's two processes, beside weights and cache


def tokens_of_blocks(kv_bytes: int, bytes_per_token: int) -> int:
    """Of all whole blocks: what the engine says that its cache has."""
    return kv_bytes // (bytes_per_token * BLOCK_TOKENS) * BLOCK_TOKENS


def tokens_that_fit(kv_bytes: int, bytes_per_token: int) -> int:
    """Of all whole blocks but one, the engine's null block, which it keeps for itself."""
    return max(0, tokens_of_blocks(kv_bytes, bytes_per_token) - BLOCK_TOKENS)


def bytes_for(streams: int, tokens: int, bytes_per_token: int) -> int:
    """The least cache that holds so many streams of so many tokens each; blocks are of one stream."""
    blocks = streams * -(-tokens // BLOCK_TOKENS) + 1
    return blocks * BLOCK_TOKENS * bytes_per_token

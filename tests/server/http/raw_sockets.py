"""What raw connections share."""

import asyncio


async def read_to_the_end(reader: asyncio.StreamReader) -> bytes:
    """Everything until the connection ends, however it does."""
    found = b""
    try:
        while part := await reader.read(65536):
            found += part
    except ConnectionError:
        pass
    return found

"""A request over HTTP/1.1 whose answer is taken as it comes, by Python's standard library."""

import asyncio
import json
import urllib.parse


async def post(url, path, body, api_key):
    """Sends JSON, and yields the parts of the answer's body as they arrive.

    Raises `RuntimeError` if the status is not 200, with what the server said, and `EOFError` or
    `asyncio.IncompleteReadError` if the answer breaks off.
    """
    parts = urllib.parse.urlsplit(url)
    payload = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port or 80)
    try:
        writer.write(
            f"POST {parts.path}{path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer {api_key}\r\nContent-Length: {len(payload)}\r\nConnection: close\r\n\r\n".encode()
            + payload
        )
        await writer.drain()
        status, chunked = await head(reader)
        if status != 200:
            raise RuntimeError(f"status {status}: {(await reader.read(2000)).decode(errors='replace')}")
        async for part in chunks(reader) if chunked else until_closed(reader):
            yield part
    finally:
        writer.close()


async def head(reader):
    """The status, and whether the body comes in chunks."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
    return int(lines[0].split()[1]), "transfer-encoding: chunked" in lines


async def chunks(reader):
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        yield (await reader.readexactly(size + 2))[:-2]


async def until_closed(reader):
    while part := await reader.read(1 << 16):
        yield part

"""Many clients of one OpenAI-compatible server, each asking again when its answer is complete.

Plain sockets and as little parsing as tells tokens apart: the clients share the processor with the
server, so every microsecond here is taken from it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

_END = b"data: [DONE]"


@dataclass(kw_only=True)
class Load:
    """What a load took.

    Attributes:
        seconds: from the first request to the last token.
        first: seconds from each request to its first token.
        events: events with text that came in, over all requests.
    """

    seconds: float = 0.0
    first: list[float] = field(default_factory=list)
    events: int = 0


async def load_up(
    port: int, model: str, clients: int, prompts: Sequence[Sequence[int]], tokens: int
) -> Load:
    """Send all prompts through `clients` connections, greedily, exactly `tokens` tokens each.

    Raises:
        RuntimeError: the server refused a request, or an answer had too few events.
    """
    found, waiting = Load(), list(reversed(prompts))
    start = time.perf_counter()
    await asyncio.gather(*(_client(port, model, waiting, tokens, found) for _ in range(clients)))
    found.seconds = time.perf_counter() - start
    return found


async def _client(
    port: int, model: str, waiting: list[Sequence[int]], tokens: int, found: Load
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    while waiting:
        request = _request(model, waiting.pop(), tokens)
        begun = time.perf_counter()
        writer.write(request)
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(f"{status!r} {(await reader.read(2000))!r}")
        events = 0
        while not (line := await reader.readline()).startswith(_END):
            if not line:
                raise RuntimeError("the server closed the connection")
            if line.startswith(b"data: {"):
                if not events:
                    found.first.append(time.perf_counter() - begun)
                events += 1
        await _rest(reader)
        if events < tokens // 2:  # a server may put some tokens into one event
            raise RuntimeError(f"{events} events for {tokens} tokens")
        found.events += events
    writer.close()


def _request(model: str, prompt: Sequence[int], tokens: int) -> bytes:
    body = json.dumps(
        {
            "model": model,
            "prompt": list(prompt),
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
    ).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def _rest(reader: asyncio.StreamReader) -> None:
    """Read to the last, empty chunk of the answer, so that the connection can be used again."""
    while (await reader.readline()) != b"0\r\n":
        pass
    await reader.readline()

"""A server in a thread of the test's process."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from optlm.engine.llm import LLM
from optlm.serve.server import Server, ServerOptions


@dataclass(frozen=True, kw_only=True)
class Running:
    server: Server
    url: str
    port: int


@contextlib.contextmanager
def running(llm: LLM, *, checks: bool = True, **options: Any) -> Iterator[Running]:
    """Serve `llm` on any port of loopback until the block ends; then nothing of it is left.

    Args:
        checks: whether the engine must have survived.
    """
    server = Server(llm, ServerOptions(**{"name": "mini", "port": 0, **options}))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + 10
        while not server.started:
            assert thread.is_alive(), "the server ended"
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.005)
        yield Running(server=server, url=f"http://127.0.0.1:{server.port}", port=server.port)
    finally:
        server.stop()
        thread.join(20)
    assert not thread.is_alive()
    if checks:
        assert not llm.has_work
        llm.check_integrity()

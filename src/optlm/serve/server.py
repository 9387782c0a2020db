"""One process: an engine, its routes, a socket and signals."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass

import uvicorn

from optlm.engine.aio import AsyncLLM
from optlm.engine.llm import LLM
from optlm.serve.app import make_app
from optlm.serve.served import Served
from optlm.serve.service import Service

__all__ = ["Server", "ServerOptions"]


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Attributes: name: what clients call the model. host, port: where to listen."""

    name: str
    host: str = "127.0.0.1"
    port: int = 8000


class Server:
    """Owns an engine and a listening socket from construction until `run` has ended.

    Attributes:
        port: where it listens.

    Raises:
        OSError: the address cannot be had.
    """

    def __init__(self, llm: LLM, options: ServerOptions) -> None:
        self._listener = socket.create_server((options.host, options.port), backlog=1024)
        self.port: int = self._listener.getsockname()[1]
        self._engine = AsyncLLM(llm)
        service = Service(self._engine, Served.of(llm, options.name, int(time.time())))
        config = uvicorn.Config(make_app(service), log_level="warning", access_log=False)
        self._uvicorn = uvicorn.Server(config)

    @property
    def started(self) -> bool:
        return self._uvicorn.started

    def run(self) -> None:
        """Serve until `stop`, or until a signal where this is the main thread."""
        try:
            self._uvicorn.run(sockets=[self._listener])
        finally:
            self._engine.close()
            self._listener.close()

    def stop(self) -> None:
        """Take no more requests, finish those that run, and end."""
        self._uvicorn.should_exit = True

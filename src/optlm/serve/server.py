"""One process: an engine, its routes, a socket and signals."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Protocol

import uvicorn
from fastapi import FastAPI

from optlm.engine.llm import LLM
from optlm.serve.adapters import Reload
from optlm.serve.app import make_app
from optlm.serve.chat import Template, plain_chat, read_template
from optlm.serve.connections import bounded_protocol
from optlm.serve.keys import read_keys
from optlm.serve.limits import Limits
from optlm.serve.service import put_to_service
from optlm.serve.ui import mount_ui, ui_missing

__all__ = ["HttpServer", "Server", "ServerOptions", "listen", "with_pages"]


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """What a server is started with.

    Attributes:
        name: what clients call the model.
        host, port: where to listen; port 0 takes a free one.
        adapters: folder of adapters, each a subfolder; None for none.
        api_keys: file of keys; None lets everyone ask.
        chat_template: file of a Jinja template; None writes chats out plainly.
        origins: web pages of these origins may ask from a browser.
    """

    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    adapters: Path | None = None
    api_keys: Path | None = None
    chat_template: Path | None = None
    origins: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)


class Server:
    """Owns an engine and a listening socket from construction until `run` has ended.

    Attributes:
        port: where it listens.

    Raises:
        OSError: the address cannot be had, or a file cannot be read.
        RequestError: a file of keys or a template that is none.
    """

    def __init__(self, llm: LLM, options: ServerOptions) -> None:
        keys = None if options.api_keys is None else read_keys(options.api_keys)
        template: Template = plain_chat
        if options.chat_template is not None:
            template = read_template(options.chat_template)
        self._listener = listen(options.host, options.port)
        self.port: int = self._listener.getsockname()[1]
        service, folder = put_to_service(llm, options.name, options.adapters, options.limits)
        self._engine = service.engine
        app = make_app(service, template=template, keys=keys, adapters=folder)
        self._http = HttpServer(with_pages(app, options.origins), options.limits, service, folder)

    @property
    def started(self) -> bool:
        return self._http.started

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._http.server_state.connections)

    def run(self) -> None:
        """Serve until `stop`, or until SIGTERM or SIGINT where this is the main thread.

        The first signal lets the requests under way end, the second one does not.
        """
        try:
            self._http.run(sockets=[self._listener])
        finally:
            self._engine.close()
            self._listener.close()

    def stop(self) -> None:
        """Take no more requests, finish those that run, and end."""
        self._http.end()


class Ends(Protocol):
    """What is told that the server ends."""

    draining: bool


class HasAdapters(Protocol):
    """What can look for new adapters."""

    async def reload(self) -> Reload: ...
    async def close(self) -> None: ...


class HttpServer(uvicorn.Server):
    """uvicorn with signals as `Server.run` has them, and SIGHUP for adapters."""

    def __init__(
        self, app: FastAPI, limits: Limits, service: Ends, adapters: HasAdapters | None
    ) -> None:
        config = uvicorn.Config(
            app,
            http=bounded_protocol(limits),
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
        )
        super().__init__(config)
        self._service = service
        self._adapters = adapters
        self._reloads: set[asyncio.Task[None]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        if self._adapters is not None:
            await self._reload()
            if threading.current_thread() is threading.main_thread():
                loop = asyncio.get_running_loop()
                loop.add_signal_handler(signal.SIGHUP, self._start_reload)
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self._adapters is not None:
            await self._adapters.close()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        kinds = [signal.SIGTERM, signal.SIGINT]
        if self._adapters is None and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            kinds.append(signal.SIGHUP)  # with adapters it means to look for new ones
        before = {kind: signal.signal(kind, self.handle_exit) for kind in kinds}
        try:
            yield
        finally:
            for kind, handler in before.items():
                signal.signal(kind, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
        self.end()

    def end(self) -> None:
        self._service.draining = True
        self.should_exit = True

    def _start_reload(self) -> None:
        task = asyncio.ensure_future(self._reload())
        self._reloads.add(task)
        task.add_done_callback(self._reloads.discard)

    async def _reload(self) -> None:
        """Look into the folder of adapters and tell on stderr what came of it."""
        assert self._adapters is not None
        try:
            told = await self._adapters.reload()
        except Exception as error:  # the server goes on with the adapters it has
            _say(f"the folder of adapters cannot be read: {error}")
            return
        for name in told.loaded:
            _say(f"adapter {name} is loaded")
        for name in told.removed:
            _say(f"adapter {name} is gone")
        for name, reason in told.refused.items():
            _say(f"adapter {name!a} is left out: {reason}")


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 takes a free one.

    Raises:
        OSError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=1024)


def with_pages(app: FastAPI, origins: tuple[str, ...]) -> FastAPI:
    """Add what is for browsers: the playground, if it is installed, and who else may ask."""
    if ui_missing() is None:
        mount_ui(app)
    if origins:
        from starlette.middleware.cors import CORSMiddleware

        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        )
    return app


def _say(message: str) -> None:
    with contextlib.suppress(OSError):  # a full disk, or nobody listens
        print(f"optlm: {message}", file=sys.stderr, flush=True)

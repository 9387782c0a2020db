"""`Replica`: an engine in a worker of Ray's, and the server's routes over it, without sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, MutableMapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from fastapi import FastAPI

from optlm.engine.llm import LLM
from optlm.errors import EngineError
from optlm.serve.app import make_app
from optlm.serve.chat import make_template, plain_chat
from optlm.serve.connections import ABORT
from optlm.serve.limits import Limits
from optlm.serve.service import put_to_service

__all__ = ["Head", "Replica", "ReplicaOptions", "Whole", "respond"]

_ENDING = 5.0  # seconds in which a request that nobody waits for must have ended


class Head(NamedTuple):
    """How an answer begins."""

    status: int
    headers: list[tuple[bytes, bytes]]


class Whole(NamedTuple):
    """A whole answer, and the name of the replica it is from."""

    replica: str
    head: Head
    body: bytes


@dataclass(frozen=True, kw_only=True)
class ReplicaOptions:
    """What every replica is started with.

    Attributes:
        load: loads its engine.
        name: what clients call the model.
        chat_template: the text of a Jinja template; None writes chats out plainly.
        adapters: folder of adapters, which every node sees under this path.
        loopback: the cluster is this machine alone, and nobody else is to reach it.
    """

    load: Callable[[], LLM]
    name: str
    chat_template: str | None = None
    adapters: Path | None = None
    limits: Limits
    loopback: bool


class Replica:
    """What Ray Serve runs: see `optlm.serve.cluster.server`."""

    def __init__(self, options: ReplicaOptions) -> None:
        if options.loopback:
            _listen_on_loopback()
        llm = options.load()
        given = options.chat_template
        template = plain_chat if given is None else make_template(given)
        service, self._folder = put_to_service(llm, options.name, options.adapters, options.limits)
        self._engine = service.engine
        self._app = make_app(service, template=template, adapters=self._folder)

    async def reconfigure(self, _: Any) -> None:
        """Load the adapters; Ray Serve calls it before the first request."""
        if self._folder is not None:
            await self._folder.reload()

    async def check_health(self) -> None:
        """A replica whose engine has died is replaced."""
        if self._engine.error is not None:
            raise EngineError(self._engine.error)

    async def answer(
        self, beginnings: Sequence[bytes], method: str, path: str, body: bytes
    ) -> AsyncGenerator[Head | bytes | None, None]:
        """Yield None at once, then how the answer begins, then pieces of its body.

        Args:
            beginnings: for `PrefixRouter`.
        """
        yield None
        async with aclosing(respond(self._app, method, path, body)) as parts:
            async for part in parts:
                yield part

    async def whole(self, method: str, path: str) -> Whole:
        """Answer a request without a body at once."""
        from ray import serve

        parts = [part async for part in respond(self._app, method, path, b"")]
        head = next(part for part in parts if isinstance(part, Head))
        body = b"".join(part for part in parts if isinstance(part, bytes))
        return Whole(serve.get_replica_context().replica_id.unique_id, head, body)


def _listen_on_loopback() -> None:
    """Ray Serve opens a port of each replica on all interfaces, after this was made, and asks
    nobody who calls there for a key.
    """
    replica: Any = import_module("ray.serve._private.replica")
    add_port = replica.add_port_to_grpc_server

    def add_loopback_port(server: Any, address: str) -> Any:
        return add_port(server, address.replace("[::]", "127.0.0.1"))

    replica.add_port_to_grpc_server = add_loopback_port


async def respond(
    app: FastAPI, method: str, path: str, body: bytes
) -> AsyncGenerator[Head | bytes, None]:
    """Ask an app as a server would; closing the iterator is the client's going away.

    Pieces that come together are one: what is under way to a reader costs by the piece.
    """
    messages: asyncio.Queue[MutableMapping[str, Any] | None] = asyncio.Queue()
    gone = asyncio.Event()
    requests = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> MutableMapping[str, Any]:
        if not requests:
            await gone.wait()
        return requests.pop() if requests else {"type": "http.disconnect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        messages.put_nowait(message)

    scope = _scope(method, path) | {"extensions": {ABORT: {"call": gone.set}}}
    task = asyncio.ensure_future(app(scope, receive, send))
    task.add_done_callback(lambda _: messages.put_nowait(None))
    try:
        message = await messages.get()
        while message is not None:
            if message["type"] == "http.response.start":
                yield Head(message["status"], list(message["headers"]))
                message = await messages.get()
                continue
            pieces = []
            while message is not None:
                pieces.append(message["body"])
                if messages.empty():
                    break
                message = messages.get_nowait()
            yield b"".join(pieces)
            if message is not None:
                message = await messages.get()
        await task
    finally:
        gone.set()
        await asyncio.wait((task,), timeout=_ENDING)
        task.cancel()


def _scope(method: str, path: str) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json")],
        "client": None,
        "server": None,
    }

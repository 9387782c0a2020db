"""Serve a model over HTTP, with OpenAI's API.

SIGTERM or Ctrl-C lets the requests under way end, a second one does not.
SIGHUP looks for new, changed and deleted adapters.
"""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from pathlib import Path

from optlm.cli.common import add_engine_options, engine_options, model_name, say, usage_error

USAGE = "[options]"


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port, 0 for any (%(default)s)")
    parser.add_argument("--name", help="what clients call the model (default: its folder's name)")
    parser.add_argument(
        "--adapters", type=Path, metavar="DIR", help="folder with a subfolder for each adapter"
    )
    parser.add_argument(
        "--api-keys", type=Path, metavar="FILE", help="who may ask; lines of NAME KEY [limits]"
    )
    parser.add_argument(
        "--chat-template", type=Path, metavar="FILE", help="how chats are written out, in Jinja"
    )
    parser.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let pages of this origin ask from a browser; may be repeated",
    )
    add_engine_options(parser)


def run(options: Namespace) -> None:
    if not 0 <= options.port < 2**16:
        raise usage_error(f"--port is {options.port}; it must lie between 0 and 65535")
    if options.adapters is not None:
        os.listdir(options.adapters)  # now, not after the model is loaded
    try:
        from optlm.serve.server import Server, ServerOptions
    except ModuleNotFoundError as error:
        raise usage_error(
            f"serving needs {error.name}, which is not installed: pip install 'optlm[serve]'"
        ) from None
    from optlm.engine.llm import LLM

    llm = LLM(options.model, **engine_options(options))
    name = options.name or model_name(options.model)
    server = Server(
        llm,
        ServerOptions(
            name=name,
            host=options.host,
            port=options.port,
            adapters=options.adapters,
            api_keys=options.api_keys,
            chat_template=options.chat_template,
            origins=tuple(options.allow_origin),
        ),
    )
    if options.api_keys is None and not _is_loopback(options.host):
        say("anyone who reaches this address may use the model; --api-keys FILE restricts it")
    say(f"serving {name} at http://{options.host}:{server.port}/v1")
    server.run()


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")

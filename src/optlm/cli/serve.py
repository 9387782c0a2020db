"""Serve a model over HTTP, with OpenAI's API.

SIGTERM or Ctrl-C lets the requests under way end, a second one does not.
SIGHUP looks for new, changed and deleted adapters.
"""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optlm.cli.common import add_engine_options, engine_options, model_name, say, usage_error

if TYPE_CHECKING:
    from optlm.serve.cluster.options import ClusterOptions
    from optlm.serve.server import ServerOptions

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
    group = parser.add_argument_group("over a Ray cluster (pip install 'optlm[ray]')")
    group.add_argument(
        "--ray", action="store_true", help="replicas of the engine behind this server"
    )
    group.add_argument(
        "--ray-address", metavar="A", help="of a cluster that runs (a new one on this machine)"
    )
    group.add_argument(
        "--replicas",
        metavar="N | MIN:MAX",
        help="how many; between the two as load wants (1 to all processors / --threads)",
    )
    add_engine_options(parser)


def run(options: Namespace) -> None:
    if not 0 <= options.port < 2**16:
        raise usage_error(f"--port is {options.port}; it must lie between 0 and 65535")
    if options.adapters is not None:
        os.listdir(options.adapters)  # now, not after the model is loaded
    cluster = _cluster_options(options)
    try:
        from optlm.serve.server import ServerOptions
    except ModuleNotFoundError as error:
        raise usage_error(
            f"serving needs {error.name}, which is not installed: pip install 'optlm[serve]'"
        ) from None
    served = ServerOptions(
        name=options.name or model_name(options.model),
        host=options.host,
        port=options.port,
        adapters=options.adapters,
        api_keys=options.api_keys,
        chat_template=options.chat_template,
        origins=tuple(options.allow_origin),
    )
    if cluster is None:
        _serve(options, served)
    else:
        _serve_cluster(options, served, cluster)


def _serve(options: Namespace, served: ServerOptions) -> None:
    from optlm.engine.llm import LLM
    from optlm.serve.server import Server

    server = Server(LLM(options.model, **engine_options(options)), served)
    _tell(served, server.port)
    server.run()


def _serve_cluster(options: Namespace, served: ServerOptions, cluster: ClusterOptions) -> None:
    from optlm.assets import bundled_model
    from optlm.checkpoint import open_checkpoint
    from optlm.engine.llm import LLM
    from optlm.serve.cluster.server import ClusterServer

    model = bundled_model() if options.model is None else options.model
    open_checkpoint(model)  # what is wrong with it is told here, not in a worker
    given = engine_options(options) | {"threads": cluster.threads}
    server = ClusterServer(partial(LLM, options.model, **given), served, cluster)
    server.run(lambda: _tell(served, server.port))


def _cluster_options(options: Namespace) -> ClusterOptions | None:
    given = {"--ray-address": options.ray_address, "--replicas": options.replicas}
    there = [name for name, value in given.items() if value is not None]
    if not options.ray:
        if there:
            raise usage_error(f"{there[0]} goes with --ray")
        return None
    from optlm.serve.cluster.options import ClusterOptions

    replicas = _replicas(options.replicas)
    return ClusterOptions(
        address=options.ray_address,
        threads=1 if options.threads is None else options.threads,
        **replicas,
    )


def _replicas(given: str | None) -> dict[str, Any]:
    """The least and the most of ``N`` or ``MIN:MAX``."""
    if given is None:
        return {}
    least, _, most = given.partition(":")
    numbers = [least, most or least]
    if not all(number.isascii() and number.isdigit() for number in numbers):
        raise usage_error(f"--replicas is {given!r}; it must be a number, or two as in 1:4")
    return {"least": int(numbers[0][:9]), "most": int(numbers[1][:9])}


def _tell(served: ServerOptions, port: int) -> None:
    if served.api_keys is None and not _is_loopback(served.host):
        say("anyone who reaches this address may use the model; --api-keys FILE restricts it")
    say(f"serving {served.name} at http://{served.host}:{port}/v1")


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")

"""Serve a model over HTTP, with OpenAI's API."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from optlm.cli.common import add_engine_options, engine_options, model_name, say, usage_error

USAGE = "[options]"


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port, 0 for any (%(default)s)")
    parser.add_argument("--name", help="what clients call the model (default: its folder's name)")
    add_engine_options(parser)


def run(options: Namespace) -> None:
    if not 0 <= options.port < 2**16:
        raise usage_error(f"--port is {options.port}; it must lie between 0 and 65535")
    try:
        from optlm.serve.server import Server, ServerOptions
    except ModuleNotFoundError as error:
        raise usage_error(
            f"serving needs {error.name}, which is not installed: pip install 'optlm[serve]'"
        ) from None
    from optlm.engine.llm import LLM

    llm = LLM(options.model, **engine_options(options))
    name = options.name or model_name(options.model)
    server = Server(llm, ServerOptions(name=name, host=options.host, port=options.port))
    say(f"serving {name} at http://{options.host}:{server.port}/v1")
    server.run()

"""Tell how sure a model is: of every token, of an answer, of its choices in a task.

Figures come from whole distributions, never from the likeliest few. Logarithms are natural, in
nats. `optlm uncertainty ACTION --help` tells what an action does.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from importlib import import_module

from optlm.cli.common import FAILURE, say

USAGE = "tokens|answer|calibrate|evaluate|select ..."

_ACTIONS = {
    "tokens": "colour a text by how unsure the model is of each token",
    "answer": "answer a prompt and tell how sure the answer is as a whole",
    "calibrate": "find the temperature under which confidences mean what they say",
    "evaluate": "compare estimators on items whose answers are known; bound the risk",
    "select": "choose the texts that are most worth labelling",
}


def add_options(parser: ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, told in _ACTIONS.items():
        module = import_module(f"optlm.cli.uncertainty_{name}")
        action = actions.add_parser(
            name,
            prog=f"optlm uncertainty {name}",
            usage=f"optlm uncertainty {name} {module.USAGE}",
            help=told,
            description=module.__doc__,
            formatter_class=RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_options(action)
        action.set_defaults(do=module.run)


def run(options: Namespace) -> int | None:
    try:
        code: int | None = options.do(options)
    except ModuleNotFoundError as error:
        say(f"error: this needs {error.name}; install it with: pip install 'optlm[train]'")
        return FAILURE
    return code

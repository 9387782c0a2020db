"""Choose the texts that are most worth labelling: the model is unsure of them, and they differ.

Texts are the lines of a file, or "text" of JSON Lines. The most uncertain (--breadth times as many
as wanted) are candidates; then each choice is the one farthest from those already chosen, by the
mean hidden state. Writes the texts as JSON Lines, in the order they were chosen.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path

from optlm.cli.common import add_adapter_options, add_engine_options, load_model
from optlm.cli.progress import count_bar

USAGE = "FILE -k N [options]"

_BY = ("entropy", "likelihood", "normalised-likelihood", "margin", "self-certainty")


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="texts, also .gz and .zst")
    parser.add_argument("-k", "--count", type=int, required=True, metavar="N", help="how many")
    parser.add_argument("--by", choices=_BY, default="entropy", help="uncertainty (entropy)")
    parser.add_argument(
        "--breadth", type=float, default=5.0, metavar="X",
        help="candidates for each choice; 1 is uncertainty alone (5)",
    )  # fmt: skip
    add_engine_options(parser)
    add_adapter_options(parser)


def run(options: Namespace) -> None:
    from optlm.uncertainty.active import select
    from optlm.uncertainty.asking import token_figures
    from optlm.uncertainty.hidden import hidden_states
    from optlm.uncertainty.items import read_texts
    from optlm.uncertainty.measures import measure
    from optlm.uncertainty.reading import as_ids

    texts = read_texts(options.file)
    llm = load_model(options)
    sequences = [as_ids(llm, text) for text in texts]
    with count_bar("texts", len(texts)) as progress:
        figures = [token_figures(each) for each in measure(llm, sequences, progress=progress)]
    uncertainty = [each[options.by] for each in figures]
    states = hidden_states(llm, sequences)
    for place in select(uncertainty, states, options.count, breadth=options.breadth):
        print(json.dumps({options.by: uncertainty[place], "text": texts[place]}))

"""Numbers that others printed for the published OPT checkpoints, to stand beside ours.

The OPT paper prints the results of its 16 tasks as plots only, so most come from elsewhere;
``published.json`` names the source of each.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

from optlm.config import PUBLISHED
from optlm.engine.llm import LLM

__all__ = ["Published", "published_numbers", "size_of"]

_ENGLISH = (
    "The committee met on Tuesday and agreed that the new bridge should be built before the end of "
    "the year, because the old one had become too dangerous for the people of the town."
)
_TRAINED = 6.0  # nats a token; a model that guesses among 50272 is at 10.8


@dataclass(frozen=True, kw_only=True)
class Published:
    """A printed number: a share for accuracies and F1."""

    task: str
    metric: str
    size: str
    shots: int
    value: float
    source: str
    note: str = ""


def published_numbers(task: str, size: str | None) -> tuple[Published, ...]:
    """What was printed for a task and a published size."""
    return tuple(row for row in _table() if row.task == task and row.size == size)


def size_of(llm: LLM) -> str | None:
    """The published size that this model is a checkpoint of; None for others and untrained ones.

    A model of that shape which reads plain English hardly better than by guessing has random
    weights; to set published numbers beside its own would mislead.
    """
    shape = _shape(llm.config)
    named = [name for name, known in PUBLISHED.items() if _shape(known.config) == shape]
    if not named or llm.tokenizer is None:
        return None
    scored = llm.score(_ENGLISH)[0]
    return named[0] if -scored.total / scored.num_scored < _TRAINED else None


def _shape(config: object) -> tuple[object, ...]:
    names = ("hidden_size", "num_hidden_layers", "ffn_dim", "num_attention_heads", "vocab_size")
    return tuple(getattr(config, name) for name in names)


@functools.cache
def _table() -> tuple[Published, ...]:
    path = Path(__file__).parent / "published.json"
    return tuple(Published(**row) for row in json.loads(path.read_text(encoding="utf-8")))

"""Tiny models of every variant, in memory and with their tokenizer, for these tests."""

from __future__ import annotations

import functools

import torch

from optlm.interpret import Subject
from optlm.model import OPT
from optlm.tokenizer import Tokenizer
from variants import VARIANTS, make_state, tiny_tokenizer

TEXT = "the cat sat on the mat and then the cat"


@functools.cache
def tiny(name: str) -> OPT:
    """The variant's model with random weights; shared by tests, which must not change it."""
    config = VARIANTS[name]
    model = OPT(config)
    model.load_state_dict({k: torch.from_numpy(v) for k, v in make_state(config).items()})
    return model.eval()


@functools.cache
def subject(name: str) -> Subject:
    config = VARIANTS[name]
    return Subject(
        name=name,
        model=tiny(name),
        tokenizer=Tokenizer(tiny_tokenizer(config.vocab_size), config=config, origin=name),
    )


def tokens(name: str, length: int = 11, seed: int = 0) -> list[int]:
    """The start token and random others."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VARIANTS[name].vocab_size, (length - 1,), generator=random)
    return [2, *ids.tolist()]

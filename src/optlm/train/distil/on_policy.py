"""Rows that the student writes itself, for on-policy distillation (GKD, arXiv 2306.13649).

A student that only ever reads the corpus is never told what to do after its own mistakes. Here it
continues the beginning of a corpus row by sampling, and the teacher judges every token of that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optlm.model import OPT

__all__ = ["write_rows"]


@torch.no_grad()
def write_rows(
    model: OPT, prompts: Tensor, length: int, *, temperature: float, seed: int
) -> Tensor:
    """Continue `prompts` (B, P) to (B, length) by sampling from `model`.

    PyTorch's own random state and the model's mode stay as they were.
    """
    random = torch.Generator(device=prompts.device).manual_seed(seed)
    training = model.training
    model.eval()  # no dropout in what is written
    try:
        rows, past = prompts, None
        while rows.shape[1] < length:
            new = rows if past is None else rows[:, -1:]
            output = model(new, past=past)
            past = output.cache
            probs = (output.logits[:, -1].float() / temperature).softmax(dim=-1)
            chosen = torch.multinomial(probs, 1, generator=random)
            rows = torch.cat([rows, chosen], dim=1)
    finally:
        model.train(training)
    return rows

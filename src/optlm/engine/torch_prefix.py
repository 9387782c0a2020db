"""Virtual tokens as keys and values that every layer sees before the text.

A prefix (arXiv 2101.00190) stores them; a prompt (arXiv 2104.08691) stores embeddings, which the
layers turn into them once. They come before the text and take none of its positions.

Letters: n virtual tokens, L layers, H heads, K head width, D hidden size, E embedding width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optlm.checkpoint.adapter import Adapter
from optlm.config import POSITION_OFFSET, OPTConfig
from optlm.model import OPT

__all__ = ["Prefix", "prefix_of", "run_prompt", "split_prefix"]

Prefix = list[tuple[Tensor, Tensor]]  # of each layer keys and values, (1, H, n, K)


def split_prefix(numbers: Tensor, config: OPTConfig) -> Prefix:
    """(n, 2 L D) as peft stores them: of each token layer after layer, keys before values."""
    count, heads = len(numbers), config.num_attention_heads
    states = numbers.view(count, 2 * config.num_hidden_layers, heads, config.head_dim)
    states = states.permute(1, 2, 0, 3)  # (2 L, H, n, K)
    return [(states[i, None], states[i + 1, None]) for i in range(0, len(states), 2)]


def run_prompt(model: OPT, embeddings: Tensor, *, positions: bool) -> Prefix:
    """Keys and values of embeddings (n, E) that stand before the text.

    Args:
        positions: add the embeddings of positions 0 to n - 1, as peft on transformers does.
    """
    decoder = model.decoder
    x = embeddings[None]
    x = x if decoder.project_in is None else decoder.project_in(x)
    if positions:
        zero_based = torch.arange(len(embeddings), device=x.device)
        x = x + decoder.embed_positions(zero_based + POSITION_OFFSET)
    states = []
    for layer in decoder.layers:
        x, cache, _ = layer(x, None, None, False)
        states.append(cache)
    return states


@torch.no_grad()
def prefix_of(adapter: Adapter, model: OPT) -> Prefix:
    """The keys and values of an adapter of virtual tokens."""
    assert adapter.prompt is not None
    weight = model.head_weight
    numbers = torch.from_numpy(adapter.prompt.numpy()).to(weight.device, weight.dtype)
    if adapter.settings.kind == "prefix":
        return split_prefix(numbers, model.config)
    return run_prompt(model, numbers, positions=adapter.text_start > 0)

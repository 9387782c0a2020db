"""How far a model has moved from its base on text that the training is not about.

Letters: B texts, T tokens, N predictions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from optlm.model import IGNORE, OPT
from optlm.train.finetune.adapters import Adapted
from optlm.train.finetune.examples import Example
from optlm.train.finetune.packing import make_rows
from optlm.train.loop.device import to_device

__all__ = ["ForgettingMeter", "own_texts"]

_TEXTS, _LENGTH = 8, 48  # of the base's own making
_BYTES = 64_000_000  # of the base's probabilities in memory


@torch.no_grad()
def own_texts(base: OPT, *, seed: int) -> list[Example]:
    """Texts that `base` draws from its own distribution: over them the divergence from the base is
    measured where the base expects to be used."""
    device = base.head_weight.device
    random = torch.Generator().manual_seed(seed)
    length = min(_LENGTH, base.config.max_position_embeddings - 1)
    tokens = new = torch.full((_TEXTS, 1), base.config.bos_token_id, device=device)
    past = None
    for _ in range(length):
        output = base(new, past=past)
        past = output.cache
        probs = output.logits[:, -1].float().softmax(1).cpu()
        new = torch.multinomial(probs, 1, generator=random).to(device)
        tokens = torch.cat([tokens, new], dim=1)
    return [Example(row) for row in tokens.tolist()]


class ForgettingMeter:
    """KL(base || model) in nats a token, on the same neutral texts whenever it is asked.

    Args:
        texts: their first predictions are used, as many as 64 MB of the base's probabilities hold.
    """

    def __init__(self, base: Adapted, texts: Sequence[Example]) -> None:
        room = max(1, _BYTES // (4 * base.base.config.vocab_size))
        kept = []
        for text in texts:
            kept.append(Example(text.tokens[: room + 1]))
            room -= kept[-1].length
            if room < 1:
                break
        rows = make_rows([[text] for text in kept], base.base.config.pad_token_id)
        self._rows = to_device(rows, base.device)
        self._reference = self._log_probs(base)

    @torch.no_grad()
    def __call__(self, model: Adapted) -> float:
        log_probs = self._log_probs(model)
        divergence = (self._reference.exp() * (self._reference - log_probs)).sum(dim=1)
        return float(divergence.mean())

    @torch.no_grad()
    def _log_probs(self, model: Adapted) -> Tensor:
        """(N, V)."""
        counted = self._rows.targets.flatten() != IGNORE
        hidden = model.hidden(self._rows).flatten(0, 1)[counted]
        return model.logits(hidden).float().log_softmax(dim=1)

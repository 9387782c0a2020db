"""The model under study: its weights in PyTorch, its vocabulary, and how a text becomes tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from optlm.assets import bundled_model
from optlm.checkpoint.load import resolve
from optlm.errors import CheckpointError, ContextLengthError, RequestError
from optlm.model import OPT
from optlm.tokenizer import Tokenizer

__all__ = ["Subject", "check_finite", "open_subject", "token_rows"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """A model in evaluation mode with its tokenizer."""

    name: str
    model: OPT
    tokenizer: Tokenizer

    def tokens(self, text: str) -> list[int]:
        """Ids of `text` after the start token, once.

        Raises:
            RequestError: there is no text.
            ContextLengthError: it does not fit the context; nothing is cut silently.
        """
        ids = self.tokenizer.encode(text, add_bos=True)
        if len(ids) < 2:
            raise RequestError("the text is empty; give at least one character")
        context = self.model.config.max_position_embeddings
        if len(ids) > context:
            raise ContextLengthError(
                f"the text has {len(ids)} tokens with the start token; the context is {context}. "
                "Give a shorter piece of it"
            )
        return ids

    def texts(self, ids: Sequence[int]) -> list[str]:
        r"""Each token by itself for display; bytes that are no UTF-8 alone appear as ``\xe2``."""
        return [self.tokenizer.token_text(token) for token in ids]


def open_subject(
    source: str | Path | None = None, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Subject:
    """Load a folder or hub name of any layout; None is the bundled model.

    Raises:
        CheckpointError: files are missing or damaged, or a weight holds NaN or infinity.
        ConfigError: it is no OPT.
        TokenizerError: it has no vocabulary that fits.
    """
    folder = bundled_model() if source is None else resolve(source)
    model = OPT.from_checkpoint(folder, dtype=dtype).to(device)
    tokenizer = Tokenizer.from_folder(folder, model.config)
    return Subject(
        name="bundled" if source is None else str(source), model=model, tokenizer=tokenizer
    )


def token_rows(model: OPT, tokens: Sequence[int]) -> Tensor:
    """`tokens` as the one row (1, T) of a batch, on the model's device; every study begins here.

    Raises:
        RequestError: there are none, or the model is in training mode. (The model itself refuses
            ids outside the vocabulary and more tokens than the context has.)
        CheckpointError: weights hold NaN or infinity.
    """
    if len(tokens) == 0:
        raise RequestError("there are no tokens; give at least one")
    if model.training:
        raise RequestError("the model is in training mode, where dropout acts; call model.eval()")
    _check_weights(model)
    return torch.tensor([list(tokens)], dtype=torch.long, device=model.head_weight.device)


def _check_weights(model: OPT) -> None:
    """One pass over the weights: PyTorch's fused attention turns a NaN into finite numbers.

    Raises:
        CheckpointError: weights hold NaN or infinity; they are named.
    """
    extremes = (
        (name, torch.stack(weight.detach().aminmax())) for name, weight in model.named_parameters()
    )
    wrong = [name for name, pair in extremes if not pair.isfinite().all()]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(f"weights hold NaN or infinity: {', '.join(wrong[:3])}{more}")


def check_finite(value: Tensor) -> None:
    """Refuse a result with NaN or infinity, of weights that `token_rows` found finite.

    Raises:
        CheckpointError: `value` holds one.
    """
    if not bool(value.isfinite().all()):
        raise CheckpointError(
            "the forward pass overflows although all weights are finite; use float32, and look at "
            "the weights with `optlm doctor`"
        )

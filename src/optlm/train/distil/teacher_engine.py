"""The engine as a teacher: log-probabilities after every token of a row, a chunk at a time.

The native engine holds the teacher in any of its formats, int8 among them; PyTorch's runner is its
twin.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optlm.checkpoint import Checkpoint
from optlm.engine.runner import BLOCK_SIZE, RunnerOptions, make_runner

__all__ = ["EngineTeacher"]

_CHUNK = 256  # tokens a call, so that (tokens, vocabulary) stays small


class EngineTeacher:
    """Reads rows of tokens with an engine's runner.

    Args:
        temperature: of the log-probabilities.
        dtype, backend, threads, device: as in `optlm.LLM`.

    Raises:
        BackendError: the backend is not there, or cannot do what was asked.
        RequestError: an unknown dtype or backend.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        temperature: float,
        dtype: str = "auto",
        backend: str = "auto",
        threads: int | None = None,
        device: str | None = None,
    ) -> None:
        context = checkpoint.config.max_position_embeddings
        options = RunnerOptions(
            dtype=dtype,  # type: ignore[arg-type]  # it checks them
            backend=backend,  # type: ignore[arg-type]
            threads=threads,
            device=device,
            max_batch_tokens=_CHUNK,
            num_blocks=-(-context // BLOCK_SIZE),
        )
        self._runner = make_runner(checkpoint, options)
        self._temperature = temperature

    def __call__(self, tokens: NDArray[np.int64]) -> Iterator[Tensor]:
        """Log-probabilities (n, V) after the tokens (B, S), row after row, up to _CHUNK at once."""
        for row in tokens.astype(np.int32):
            for begin in range(0, len(row), _CHUNK):
                yield self._read(row[begin : begin + _CHUNK], begin)

    def _read(self, tokens: NDArray[np.int32], begin: int) -> Tensor:
        count = len(tokens)
        logits = self._runner.forward(
            tokens,
            np.arange(begin, begin + count, dtype=np.int32),
            np.array([0, count], dtype=np.int32),
            np.arange(self._runner.num_blocks, dtype=np.int32)[None],
            np.arange(count, dtype=np.int32),
        )
        return (torch.from_numpy(logits) / self._temperature).log_softmax(dim=1)

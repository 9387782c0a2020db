"""Types of the compiled core; the arrays and their checks are described in csrc/bindings.cc."""

import numpy as np
from numpy.typing import NDArray

BLOCK_TOKENS: int

def instruction_set(isa: str = "auto") -> str: ...
def trim_heap() -> None: ...

class Model:
    def __init__(
        self,
        *,
        vocab_size: int,
        hidden_size: int,
        num_layers: int,
        ffn_dim: int,
        num_heads: int,
        max_positions: int,
        embed_dim: int,
        norm_before: bool,
        final_norm: bool,
        tied: bool,
        activation: str,
        dtype: str,
        kv_dtype: str,
        num_blocks: int,
        positions_dtype: str,
        max_batch_tokens: int,
        threads: int,
        isa: str = "auto",
        packed: NDArray[np.uint8] | None = None,
    ) -> None: ...
    def load(
        self, name: str, data: NDArray[np.uint8], dtype: str, rows: int, cols: int
    ) -> None: ...
    def forward(
        self,
        tokens: NDArray[np.int32],
        positions: NDArray[np.int32],
        seq_starts: NDArray[np.int32],
        block_tables: NDArray[np.int32],
        rows: NDArray[np.int32],
        logits: NDArray[np.float32] | None,
        hidden: NDArray[np.float32] | None,
        best: NDArray[np.int32] | None = None,
        adapters: NDArray[np.int32] | None = None,
    ) -> None: ...
    def add_adapter(self) -> int: ...
    def set_adapter(
        self, id: int, module: str, a: NDArray[np.float32], b: NDArray[np.float32]
    ) -> None: ...
    def set_prefix(
        self, id: int, numbers: NDArray[np.float32], text_start: int, runs: bool
    ) -> None: ...
    def remove_adapter(self, id: int) -> None: ...
    def head(self, hidden: NDArray[np.float32], logits: NDArray[np.float32]) -> None: ...
    def copy_blocks(self, source: NDArray[np.int32], target: NDArray[np.int32]) -> None: ...
    def set_skip_zeros(self, on: bool) -> None: ...
    def active_share(self) -> float: ...
    @property
    def weights(self) -> NDArray[np.uint8]: ...
    @property
    def bytes_per_token(self) -> int: ...
    @property
    def threads(self) -> int: ...
    @property
    def instruction_set(self) -> str: ...

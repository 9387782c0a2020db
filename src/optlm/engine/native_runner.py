"""The `Runner` on the compiled core (`optlm._core`): packed weights, paged cache, no PyTorch.

Letters: T new tokens, B sequences, M blocks a table, R logit rows, V vocabulary, E embedding width.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from optlm import _core
from optlm.checkpoint import Checkpoint
from optlm.checkpoint.files import forget_pages
from optlm.config import OPTConfig
from optlm.engine.cores import available_threads
from optlm.engine.runner import changes_inside_layers
from optlm.errors import BackendError, CheckpointError

if TYPE_CHECKING:
    from optlm.checkpoint.adapter import Adapter

__all__ = ["NativeRunner", "pack"]

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]

_KEPT_ROWS = 128  # logit rows whose memory is kept from step to step


class NativeRunner:
    """See `optlm.engine.runner.Runner`. Every number is the same, however tokens are batched.

    Args:
        dtype: "f32", "bf16" or "int8", the format of the matrices; vectors stay float32.
        threads: None takes every core this process may use.
        kv_dtype: "f32", "f16" or "int8" (with a scale for each token and head); None is "f32" for
            f32 weights and "f16" otherwise.
        isa: "auto", "reference", "avx2" or "avx512".
        adapter: virtual tokens that stand before every text.

    Raises:
        BackendError: an instruction set this machine lacks, or not enough memory.
        CheckpointError: weights that hold NaN or infinity, all named.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: str,
        num_blocks: int,
        max_batch_tokens: int,
        threads: int | None = None,
        kv_dtype: str | None = None,
        isa: str = "auto",
        adapter: Adapter | None = None,
    ) -> None:
        self.config: OPTConfig = checkpoint.config
        self.num_blocks = num_blocks
        self.block_size = int(_core.BLOCK_TOKENS)
        self.max_batch_tokens = max_batch_tokens
        self.dtype = dtype
        # All of it at once, so that it never moves; the system gives pages when rows are used.
        self._logits = np.empty((_KEPT_ROWS, self.config.vocab_size), np.float32)
        packed = checkpoint.packed
        if packed is not None and packed.dtype != dtype:
            raise BackendError(
                f"{checkpoint.folder} holds weights packed as {packed.dtype}, not {dtype}; "
                f"use dtype='{packed.dtype}' or 'auto'"
            )
        try:
            self.core = _new_model(
                checkpoint.config,
                dtype=dtype,
                kv_dtype=kv_dtype or ("f32" if dtype == "f32" else "f16"),
                num_blocks=num_blocks,
                max_batch_tokens=max_batch_tokens,
                threads=threads or available_threads(),
                isa=isa,
                positions_dtype=_positions_dtype(checkpoint),
                packed=None if packed is None else packed.data,
            )
        except MemoryError as error:
            raise BackendError(
                f"not enough memory for the {dtype} weights and {num_blocks} blocks of KV cache; "
                "choose a smaller dtype, num_blocks or kv_cache_bytes"
            ) from error
        except (ValueError, RuntimeError) as error:
            raise BackendError(f"the native backend cannot start: {error}") from error
        if packed is None:
            _load_weights(self.core, checkpoint)
        self._always: int | None = None  # the adapter of sequences that name none
        if adapter is not None:
            self._always = self.load_adapter(adapter)
            context = self.config.max_position_embeddings - adapter.text_start
            self.config = dataclasses.replace(self.config, max_position_embeddings=context)
        _core.trim_heap()  # parsed headers and vocabularies leave much behind

    def forward(
        self, tokens: Int32, positions: Int32, seq_starts: Int32, block_tables: Int32,
        logit_rows: Int32, adapters: Int32 | None = None,
    ) -> Float32:  # fmt: skip
        logits = self._logits_buffer(len(logit_rows))
        self.core.forward(
            tokens,
            positions,
            seq_starts,
            block_tables,
            logit_rows,
            logits,
            None,
            None,
            self._each(adapters, block_tables),
        )
        return logits

    def forward_best(
        self, tokens: Int32, positions: Int32, seq_starts: Int32, block_tables: Int32,
        logit_rows: Int32, adapters: Int32 | None = None,
    ) -> Int32:  # fmt: skip
        best = np.empty(len(logit_rows), np.int32)
        self.core.forward(
            tokens,
            positions,
            seq_starts,
            block_tables,
            logit_rows,
            None,
            None,
            best,
            self._each(adapters, block_tables),
        )
        return best

    def forward_hidden(
        self, tokens: Int32, positions: Int32, seq_starts: Int32, block_tables: Int32,
        logit_rows: Int32, adapters: Int32 | None = None,
    ) -> tuple[Float32, Float32]:  # fmt: skip
        hidden = np.empty((len(tokens), self.config.embed_dim), np.float32)
        every = np.arange(len(tokens), dtype=np.int32)
        self.core.forward(
            tokens,
            positions,
            seq_starts,
            block_tables,
            every,
            None,
            hidden,
            None,
            self._each(adapters, block_tables),
        )
        logits = np.empty((len(logit_rows), self.config.vocab_size), np.float32)
        if len(logit_rows):
            self.core.head(np.ascontiguousarray(hidden[logit_rows]), logits)
        return logits, hidden

    def _logits_buffer(self, rows: int) -> Float32:
        """An array (rows, V), the same one while there are few: pages are slow to come by anew."""
        if rows > _KEPT_ROWS:
            return np.empty((rows, self.config.vocab_size), np.float32)
        return self._logits[:rows]

    def _each(self, adapters: Int32 | None, tables: Int32) -> Int32 | None:
        if self._always is None or adapters is not None:
            return adapters
        return np.full(len(tables), self._always, np.int32)

    def load_adapter(self, adapter: Adapter) -> int:
        if adapter.prompt is not None:
            numbers = np.ascontiguousarray(adapter.prompt.numpy(), np.float32)
            adapter_id = self.core.add_adapter()
            runs = adapter.settings.kind == "prompt"
            self.core.set_prefix(adapter_id, numbers, adapter.text_start, runs)
            return adapter_id
        changes = changes_inside_layers(adapter)
        adapter_id = self.core.add_adapter()
        for module, (a, b) in changes.items():
            self.core.set_adapter(adapter_id, module, a, b)
        return adapter_id

    def unload_adapter(self, adapter_id: int) -> None:
        self.core.remove_adapter(adapter_id)

    def copy_blocks(self, source: Int32, target: Int32) -> None:
        self.core.copy_blocks(source, target)


def pack(checkpoint: Checkpoint, folder: str | Path, dtype: str) -> Path:
    """Write `checkpoint` as a packed folder, which loads in milliseconds.

    Raises:
        CheckpointError: weights that hold NaN or infinity; a folder that holds other weights.
    """
    from optlm.checkpoint import save_packed  # only here: what it needs to write files is large

    runner = NativeRunner(checkpoint, dtype=dtype, num_blocks=1, max_batch_tokens=1)
    return save_packed(
        folder,
        checkpoint.config,
        runner.core.weights,
        dtype=dtype,
        positions_dtype=_positions_dtype(checkpoint),
        tokenizer_from=checkpoint.folder,
    )


def _new_model(
    config: OPTConfig,
    *,
    dtype: str,
    kv_dtype: str,
    num_blocks: int,
    max_batch_tokens: int,
    threads: int,
    isa: str,
    positions_dtype: str,
    packed: NDArray[np.uint8] | None,
) -> _core.Model:
    return _core.Model(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        ffn_dim=config.ffn_dim,
        num_heads=config.num_attention_heads,
        max_positions=config.max_position_embeddings,
        embed_dim=config.embed_dim,
        norm_before=config.do_layer_norm_before,
        final_norm=config.has_final_layer_norm,
        tied=config.tie_word_embeddings,
        activation=config.activation_function,
        dtype=dtype,
        kv_dtype=kv_dtype,
        num_blocks=num_blocks,
        max_batch_tokens=max_batch_tokens,
        threads=threads,
        isa=isa,
        positions_dtype=positions_dtype,
        packed=packed,
    )


def _positions_dtype(checkpoint: Checkpoint) -> str:
    if checkpoint.packed is not None:
        return checkpoint.packed.positions_dtype
    return checkpoint.tensors["model.decoder.embed_positions.weight"].dtype


def _load_weights(core: _core.Model, checkpoint: Checkpoint) -> None:
    faults = []
    for name, tensor in checkpoint.tensors.items():
        raw = tensor.raw()
        rows, cols = (*raw.shape, 1)[:2]
        try:
            core.load(name, raw.reshape(-1).view(np.uint8), tensor.dtype, rows, cols)
        except ValueError as error:
            faults.append(str(error))
        forget_pages(raw)  # else the whole file would count as resident when the last one is read
    if faults:
        more = f" (and {len(faults) - 10} more)" if len(faults) > 10 else ""
        raise CheckpointError(f"{checkpoint.folder}: " + "; ".join(faults[:10]) + more)

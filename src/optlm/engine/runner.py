"""`Runner`: one forward pass over flat arrays, the boundary of bookkeeping and arithmetic.

Letters: T new tokens of all sequences, B sequences, M blocks a table, R logit rows, V vocabulary, E
embedding width.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from optlm.config import OPTConfig
from optlm.errors import BackendError, RequestError

if TYPE_CHECKING:
    from optlm.checkpoint import Checkpoint
    from optlm.checkpoint.adapter import Adapter

__all__ = [
    "NOT_FINITE",
    "Backend",
    "DType",
    "KVDType",
    "Runner",
    "RunnerOptions",
    "best_tokens",
    "changes_inside_layers",
    "make_runner",
]

Backend = Literal["auto", "native", "torch"]
DType = Literal["auto", "f32", "f16", "bf16", "int8"]
KVDType = Literal["auto", "f32", "f16", "int8"]
Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]

BLOCK_SIZE = 16
NOT_FINITE = -1  # in place of a token
_DEFAULT_CONTEXTS = 16  # full contexts the KV cache holds by default, within _DEFAULT_BYTES
_DEFAULT_BYTES = 1 << 30


class Runner(Protocol):
    """Owns the weights, the KV cache and all scratch memory.

    The keys and values of every new token are written before it is attended to, so position p sees
    0..p; earlier positions of its sequence must be in the cache. Numbers of a token depend on the
    tokens before it and on nothing
    else: bit by bit with the native runner, within float rounding with the torch one.
    """

    config: OPTConfig
    num_blocks: int  # blocks in the KV cache
    block_size: int  # tokens a block
    max_batch_tokens: int  # most tokens one call may carry

    def forward(
        self,
        tokens: Int32,  # (T,) new tokens of all sequences, back to back
        positions: Int32,  # (T,) index of each in its own sequence, from 0
        seq_starts: Int32,  # (B+1,) sequence b owns tokens[seq_starts[b]:seq_starts[b+1]]
        block_tables: Int32,  # (B, M) position p lives in block_tables[b, p // block_size]
        logit_rows: Int32,  # (R,) which of the T tokens want logits, ascending; may be empty
        adapters: Int32 | None = None,  # (B,) each sequence's adapter, -1 for none
    ) -> Float32:
        """Return the logits (R, V): writable, and valid until the next call."""
        ...

    def forward_best(
        self, tokens: Int32, positions: Int32, seq_starts: Int32, block_tables: Int32,
        logit_rows: Int32, adapters: Int32 | None = None,
    ) -> Int32:  # fmt: skip
        """Return the id of each row's largest logit (R,), the lowest of equals.

        The argmax of `forward`, without its logits in memory; `NOT_FINITE` where one of them is
        NaN or infinite.
        """
        ...

    def forward_hidden(
        self, tokens: Int32, positions: Int32, seq_starts: Int32, block_tables: Int32,
        logit_rows: Int32, adapters: Int32 | None = None,
    ) -> tuple[Float32, Float32]:  # fmt: skip
        """Return the logits (R, V) and, of all T tokens, what the head multiplies (T, E)."""
        ...

    def load_adapter(self, adapter: Adapter) -> int:
        """Take in an adapter of this runner's base, beside those there are; return its id.

        Raises:
            BackendError: a kind of adapter that this backend cannot run unmerged.
        """
        ...

    def unload_adapter(self, adapter_id: int) -> None:
        """Forget an adapter; its id may be given out again."""
        ...

    def copy_blocks(self, source: Int32, target: Int32) -> None:
        """Copy keys and values of block source[i] to target[i]; no block is in both."""
        ...


@dataclass(frozen=True, kw_only=True)
class RunnerOptions:
    """What `make_runner` lets the user choose. The KV cache's size is in blocks or in bytes."""

    dtype: DType = "auto"
    threads: int | None = None
    backend: Backend = "auto"
    device: str | None = None  # for PyTorch; None: a GPU if there is one
    max_batch_tokens: int = 512
    num_blocks: int | None = None
    kv_cache_bytes: int | None = None
    kv_dtype: KVDType = "auto"  # of keys and values; "f32" beside f32 weights, else "f16"

    def __post_init__(self) -> None:
        choices = {
            "dtype": get_args(DType),
            "backend": get_args(Backend),
            "kv_dtype": get_args(KVDType),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise RequestError(
                    f"{name} is {getattr(self, name)!r:.80}; it must be one of {', '.join(allowed)}"
                )
        limits = {
            "threads": max(64, os.cpu_count() or 1),
            "max_batch_tokens": 2**20,
            "num_blocks": 2**30,
            "kv_cache_bytes": 2**50,
        }
        for name, high in limits.items():
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
                raise RequestError(
                    f"{name} is {value!r}; it must be a whole number from 1 to {high}"
                )
        if self.num_blocks is not None and self.kv_cache_bytes is not None:
            raise RequestError("num_blocks and kv_cache_bytes both size the KV cache; give one")


def make_runner(
    checkpoint: Checkpoint, options: RunnerOptions, adapter: Adapter | None = None
) -> Runner:
    """Load a checkpoint into the backend that is there.

    Args:
        adapter: low-rank changes are merged into the weights; virtual tokens stand before every
            text.

    Raises:
        BackendError: the backend is not installed, or cannot do what was asked.
    """
    if adapter is not None and adapter.mergeable:
        from optlm.checkpoint.merge import merge_adapter

        checkpoint, adapter = merge_adapter(checkpoint, adapter), None
    torch_only = options.device not in (None, "cpu")
    backend = _choose_backend(
        "torch" if options.backend == "auto" and torch_only else options.backend
    )
    dtype = _exact_dtype(checkpoint, backend) if options.dtype == "auto" else options.dtype
    kv_dtype = _kv_dtype(options, dtype, backend)
    num_blocks = _num_blocks(checkpoint.config, options, kv_dtype)
    if backend == "native":
        from optlm.engine.native_runner import NativeRunner

        if options.device not in (None, "cpu"):
            raise BackendError(
                f"the native backend has no device {options.device!r}; use backend='torch'"
            )
        native: Runner = NativeRunner(
            checkpoint,
            dtype=dtype,
            threads=options.threads,
            kv_dtype=kv_dtype,
            num_blocks=num_blocks,
            max_batch_tokens=options.max_batch_tokens,
            adapter=adapter,
        )
        return native
    from optlm.engine.torch_runner import TorchRunner

    return TorchRunner(
        checkpoint,
        dtype=dtype,
        threads=options.threads,
        device=options.device,
        num_blocks=num_blocks,
        max_batch_tokens=options.max_batch_tokens,
        adapter=adapter,
    )


def changes_inside_layers(adapter: Adapter) -> dict[str, tuple[Float32, Float32]]:
    """A (r, inputs) and B (outputs, r), the scale in it, of each matrix that an adapter changes.

    Raises:
        BackendError: it does more than add low-rank changes to matrices inside the layers.
    """
    wrong = None
    changes = {}
    for module, change in adapter.matrices.items():
        if change.magnitude is not None:
            wrong = "is a DoRA"
        elif ".layers." not in module:
            wrong = f"changes {module}"
        a = np.ascontiguousarray(change.a.numpy(), np.float32)
        changes[module] = a, np.ascontiguousarray(change.b.numpy() * np.float32(change.scale))
    if wrong is not None:
        raise BackendError(
            f"{adapter.folder} {wrong}, which cannot run beside other adapters; give it as the "
            "one adapter of the engine (LLM(model, adapter=...), --adapter), or merge it"
        )
    return changes


def best_tokens(logits: Float32) -> Int32:
    """What `Runner.forward_best` returns, from the logits (R, V)."""
    best: Int32 = logits.argmax(axis=1).astype(np.int32)
    best[~np.isfinite(logits).all(axis=1)] = NOT_FINITE
    return best


def _choose_backend(wanted: Backend) -> Literal["native", "torch"]:
    has_native = importlib.util.find_spec("optlm._core") is not None
    has_torch = importlib.util.find_spec("torch") is not None
    if wanted in ("auto", "native") and has_native:
        return "native"
    if wanted in ("auto", "torch") and has_torch:
        return "torch"
    if wanted == "native":
        raise BackendError(
            "optlm's compiled core is not installed; reinstall optlm with a C++20 compiler"
        )
    if wanted == "torch":
        raise BackendError("PyTorch is not installed; run: pip install 'optlm[train]'")
    raise BackendError(
        "nothing here can run a model: install a C++20 compiler and reinstall optlm, "
        "or run: pip install 'optlm[train]' for PyTorch"
    )


def _exact_dtype(checkpoint: Checkpoint, backend: str) -> str:
    """The smallest format of the backend that holds the stored weights without rounding them."""
    if checkpoint.packed is not None:
        return checkpoint.packed.dtype
    stored = {tensor.dtype for tensor in checkpoint.tensors.values()}
    if stored == {"BF16"}:
        return "bf16"
    return "f16" if stored == {"F16"} and backend == "native" else "f32"


def _kv_dtype(options: RunnerOptions, dtype: str, backend: str) -> str:
    """The format of keys and values in the cache."""
    if options.kv_dtype == "auto":
        return "f32" if dtype == "f32" else "f16"
    if backend == "torch":
        raise BackendError(
            f"kv_dtype is {options.kv_dtype!r}; the torch backend keeps keys and values in the "
            "format of its weights. Leave it out, or use backend='native'"
        )
    return options.kv_dtype


def _num_blocks(config: OPTConfig, options: RunnerOptions, kv_dtype: str) -> int:
    """Blocks of the KV cache: as asked, else 16 full contexts within 1 GiB, at least one."""
    if options.num_blocks is not None:
        return options.num_blocks
    context_blocks = -(-config.max_position_embeddings // BLOCK_SIZE)
    block_bytes = BLOCK_SIZE * config.kv_bytes_per_token(kv_dtype)
    if options.kv_cache_bytes is not None:
        if options.kv_cache_bytes < block_bytes:
            raise RequestError(
                f"kv_cache_bytes is {options.kv_cache_bytes}; one block of {BLOCK_SIZE} tokens "
                f"takes {block_bytes} (a full context {context_blocks * block_bytes})"
            )
        return options.kv_cache_bytes // block_bytes
    return max(
        context_blocks, min(_DEFAULT_CONTEXTS * context_blocks, _DEFAULT_BYTES // block_bytes)
    )

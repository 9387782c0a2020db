"""Which part of every weight a process holds.

A weight is first cut over the T processes of a tensor-parallel group, then each piece is cut by its
rows over the D data-parallel groups, as FSDP does. All cuts are those of `torch.chunk`: pieces of
ceil(n / parts), the last ones smaller or empty.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from optlm.config import OPTConfig
from optlm.errors import ConfigError

__all__ = ["Grid", "Piece", "check_tensor_parallel", "piece_of", "tensor_parallel_axis"]

# Megatron's cuts (arXiv 1909.08053, section 3): what widens by output rows, what narrows by inputs.
_ROWS = re.compile(
    r".*(embed_tokens\.weight|lm_head\.weight|project_in\.weight"
    r"|(?:[qkv]_proj|fc1)\.(?:weight|bias))"
)
_COLUMNS = re.compile(r".*(?:out_proj|fc2|project_out)\.weight")


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A process's place in `data` x `tensor`; rank = data_rank * tensor + tensor_rank."""

    data: int = 1
    tensor: int = 1
    rank: int = 0

    @property
    def data_rank(self) -> int:
        return self.rank // self.tensor

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tensor


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A box inside a tensor of `shape`."""

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    copies: int = 1  # processes that hold the very same piece
    first: bool = True  # whether this process is the first of them

    @property
    def slices(self) -> tuple[slice, ...]:
        """Index of this piece in an array of `shape`."""
        pairs = zip(self.offsets, self.sizes, strict=True)
        return tuple(slice(offset, offset + size) for offset, size in pairs)

    @property
    def empty(self) -> bool:
        return 0 in self.sizes


def tensor_parallel_axis(name: str) -> int | None:
    """Axis along which tensor parallelism cuts the weight `name`; None: everyone has all of it."""
    if _ROWS.fullmatch(name):
        return 0
    return 1 if _COLUMNS.fullmatch(name) else None


def piece_of(name: str, shape: tuple[int, ...], grid: Grid) -> Piece:
    """The part of the weight `name` that the process at `grid` holds."""
    offsets, sizes = [0] * len(shape), list(shape)
    axis = tensor_parallel_axis(name) if grid.tensor > 1 else None
    if axis is not None:
        offsets[axis], sizes[axis] = _chunk(shape[axis], grid.tensor, grid.tensor_rank)
    begin, sizes[0] = _chunk(sizes[0], grid.data, grid.data_rank)
    offsets[0] += begin
    return Piece(
        shape=shape,
        offsets=tuple(offsets),
        sizes=tuple(sizes),
        copies=grid.tensor if axis is None else 1,
        first=axis is not None or grid.tensor_rank == 0,
    )


def _chunk(length: int, parts: int, index: int) -> tuple[int, int]:
    step = -(-length // parts)
    begin = min(index * step, length)
    return begin, min(step, length - begin)


def check_tensor_parallel(config: OPTConfig, parts: int) -> None:
    """Refuse a model that cannot be cut into `parts`.

    Raises:
        ConfigError: with the sizes at fault.
    """
    for name, value, reason in (
        ("num_attention_heads", config.num_attention_heads, "a head stays on one process"),
        ("ffn_dim", config.ffn_dim, "every process has the same share of the units"),
    ):
        if value % parts:
            raise ConfigError(
                f"{name} {value} is not divisible by tensor parallelism {parts}: {reason}; "
                f"choose a divisor of {value}"
            )
    if parts > 1 and -(-config.vocab_size // parts) * (parts - 1) >= config.vocab_size:
        raise ConfigError(
            f"vocab_size {config.vocab_size} is too small for tensor parallelism {parts}: "
            "some process would hold no row"
        )
    if parts > 1 and config.attention_dropout:
        raise ConfigError(
            f"attention_dropout is {config.attention_dropout}; under tensor parallelism the heads "
            "of different processes would draw the same random numbers. Set it to 0"
        )

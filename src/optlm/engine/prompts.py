"""The forms in which prompts and parameters may come, brought into one: a list of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from optlm.engine.params import SamplingParams
from optlm.errors import RequestError

__all__ = ["OnePrompt", "Prompts", "as_params", "as_prompts", "naming_prompt"]

OnePrompt = str | Sequence[int]
Prompts = OnePrompt | Sequence[OnePrompt]


def as_prompts(prompts: Prompts) -> list[OnePrompt]:
    """Prompts as a list; a sequence that begins with a number is one prompt of token ids."""
    if isinstance(prompts, str):
        return [prompts]
    listed = hasattr(prompts, "__getitem__") and hasattr(prompts, "__len__")
    if isinstance(prompts, (bytes, bytearray, Mapping)) or not listed or not _ndim(prompts):
        raise RequestError(
            "prompts are a text, a list of token ids, or a list of either, "
            f"not {type(prompts).__name__}"
        )
    if len(prompts) and not (isinstance(prompts[0], str) or hasattr(prompts[0], "__len__")):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _ndim(prompts: object) -> int:
    """0 for numpy's scalars and arrays without dimensions, which cannot be counted."""
    return int(getattr(prompts, "ndim", 1))


def as_params(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if not isinstance(params, (list, tuple)) or len(params) != count:
        given = len(params) if isinstance(params, (list, tuple)) else type(params).__name__
        raise RequestError(
            f"there are {count} prompts and {given} params; give one SamplingParams, or one each"
        )
    return list(params)


@contextmanager
def naming_prompt(index: int, count: int) -> Iterator[None]:
    """Say which of several prompts a refusal is about."""
    try:
        yield
    except RequestError as error:
        if count == 1:
            raise
        raise type(error)(f"prompt {index}: {error}") from error

"""What an engine has done, and what it is doing: the numbers of a metrics page."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Counters", "EngineStats"]


@dataclass(slots=True)
class Counters:
    """Totals that only grow, over the life of an engine."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """One look at an engine, without stopping it.

    Attributes:
        running: sequences that hold KV blocks, and the search that is under way.
        waiting: sequences and searches that are queued.
        blocks_used: KV blocks that something running needs; others may hold a reusable prefix.
        prompt_tokens: tokens of prompts that were begun, those found in the prefix cache included.
        generated_tokens: tokens chosen so far.
        prefix_queries: prompt tokens looked up in the prefix cache.
        prefix_hits: how many of them were found.
        preemptions: times a running sequence had to give its blocks back.
    """

    running: int
    waiting: int
    blocks_used: int
    blocks_total: int
    prompt_tokens: int
    generated_tokens: int
    prefix_queries: int
    prefix_hits: int
    preemptions: int

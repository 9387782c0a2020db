"""Which `Starter` a format of rows has."""

from __future__ import annotations

from optlm.batch.plain import PlainRows
from optlm.batch.settings import BatchSettings
from optlm.batch.work import Starter
from optlm.engine.llm import LLM

__all__ = ["starter_for"]


def starter_for(llm: LLM, settings: BatchSettings) -> Starter:
    return PlainRows(llm, settings)

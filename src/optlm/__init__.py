"""optlm: run, score, train and study OPT-architecture language models.

Public names are imported on first use, so that `import optlm` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optlm.assets import bundled_model
    from optlm.checkpoint.load import Checkpoint, open_checkpoint
    from optlm.checkpoint.save import save_checkpoint
    from optlm.config import PUBLISHED, OPTConfig
    from optlm.engine.llm import LLM
    from optlm.engine.outputs import RequestOutput
    from optlm.engine.params import SamplingParams
    from optlm.errors import OptlmError
    from optlm.evaluate.classify import classify
    from optlm.tokenizer import Tokenizer

__all__ = [
    "LLM",
    "SamplingParams",
    "RequestOutput",
    "OPTConfig",
    "PUBLISHED",
    "Tokenizer",
    "Checkpoint",
    "open_checkpoint",
    "save_checkpoint",
    "bundled_model",
    "OptlmError",
    "classify",
]

__version__ = "0.1.0"

_HOME = {
    "LLM": "optlm.engine.llm",
    "SamplingParams": "optlm.engine.params",
    "RequestOutput": "optlm.engine.outputs",
    "OPTConfig": "optlm.config",
    "PUBLISHED": "optlm.config",
    "Tokenizer": "optlm.tokenizer",
    "Checkpoint": "optlm.checkpoint.load",
    "open_checkpoint": "optlm.checkpoint.load",
    "save_checkpoint": "optlm.checkpoint.save",
    "bundled_model": "optlm.assets",
    "OptlmError": "optlm.errors",
    "classify": "optlm.evaluate.classify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

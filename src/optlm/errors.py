"""Every error a user of optlm can meet.

    OptlmError
    +-- ConfigError          a config.json or OPTConfig that makes no sense          (ValueError)
    +-- CheckpointError      files that are missing, broken or do not fit the config
    |   +-- UnsafeFileError  a pickle that asks for more than tensors
    +-- TokenizerError       vocabulary files that are missing or contradict each other
    +-- RequestError         a prompt or parameter that cannot be served              (ValueError)
    |   +-- ContextLengthError  prompt (and wanted tokens) do not fit the context
    +-- BackendError         neither the compiled core nor PyTorch can run this here
    +-- EngineError          the engine failed; every waiting request is told

Messages say what was wrong, the value, the limit, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = [
    "BackendError",
    "CheckpointError",
    "ConfigError",
    "ContextLengthError",
    "EngineError",
    "Fault",
    "OptlmError",
    "RequestError",
    "TokenizerError",
    "UnsafeFileError",
    "did_you_mean",
]


class OptlmError(Exception):
    """Base of all errors raised on purpose by optlm."""


class ConfigError(OptlmError, ValueError):
    """A model configuration that is incomplete, contradictory or out of range."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that is wrong with a checkpoint."""

    code: str  # stable and machine-readable, such as "missing-tensor"
    severity: str = "error"  # "error": does not load or gives wrong numbers; "warning": look at it
    where: str  # file, tensor or configuration key
    message: str

    def __post_init__(self) -> None:
        for name in ("where", "message"):
            object.__setattr__(self, name, _printable(getattr(self, name)))

    def __str__(self) -> str:
        return f"{self.where}: {self.message} [{self.code}]"


def _printable(text: str, limit: int = 500) -> str:
    """`text` on one line, cut, without control characters: it quotes files that may be hostile."""
    if len(text) > limit:
        text = text[: limit - 3] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class CheckpointError(OptlmError):
    """A checkpoint whose files are missing, damaged or do not fit its configuration.

    `faults` lists every problem found; the message shows the first ten.
    """

    def __init__(self, message: str, *, faults: Sequence[Fault] = ()) -> None:
        super().__init__(message)
        self.faults = tuple(faults)


class UnsafeFileError(CheckpointError):
    """A pickled file that would run code; it was not executed."""


class TokenizerError(OptlmError):
    """Tokenizer files that are missing, damaged or contradict the model."""


class RequestError(OptlmError, ValueError):
    """A prompt or a sampling parameter that cannot be served."""


class ContextLengthError(RequestError):
    """A prompt that does not fit the model's context under the chosen policy."""


class BackendError(OptlmError):
    """No backend on this machine can run what was asked."""


class EngineError(OptlmError):
    """The engine stopped; the requests that were running are lost."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""

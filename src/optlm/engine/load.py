"""From names of a model and an adapter to a tokenizer and a runner."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from optlm.assets import bundled_model
from optlm.config import OPTConfig
from optlm.engine.generation import TextTokenizer
from optlm.engine.runner import Runner, RunnerOptions, make_runner
from optlm.errors import CheckpointError

if TYPE_CHECKING:
    from optlm.checkpoint import Checkpoint

__all__ = ["load"]


def load(
    model: str | Path | None,
    options: RunnerOptions,
    tokenizer: TextTokenizer | Path | str | None,
    adapter: str | Path | None,
    *,
    force: bool,
) -> tuple[TextTokenizer | None, Runner, Checkpoint | None]:
    """See `LLM` for the arguments and errors.

    The last result is what the runner runs, as it is stored; None when an adapter changed it.
    """
    from optlm.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(_bundled() if model is None else model)
    found = _tokenizer(tokenizer, checkpoint.folder, checkpoint.config)
    if adapter is None:
        return found, make_runner(checkpoint, options), checkpoint
    from optlm.checkpoint.adapter import open_adapter

    opened = open_adapter(adapter, checkpoint, force=force)
    return found, make_runner(checkpoint, options, opened), None


def _bundled() -> Path:
    folder = bundled_model()
    if not folder.is_dir():
        raise CheckpointError(
            f"the bundled model is not there ({folder}); give a folder or hub name as the model"
        )
    return folder


def _tokenizer(
    wanted: TextTokenizer | Path | str | None, folder: Path, config: OPTConfig
) -> TextTokenizer | None:
    if wanted is None or not isinstance(wanted, (str, Path)):
        return wanted
    from optlm.tokenizer import Tokenizer

    return Tokenizer.from_folder(folder if wanted == "auto" else wanted, config)

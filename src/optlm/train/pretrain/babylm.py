"""The BabyLM protocol: train on so many words and no more, look at fixed counts of words read.

One file of settings is that of `optlm pretrain` with an object ``babylm`` and without
``loop.steps``: the steps follow from the words. Checkpoints stay at 1, 2 ... 10, 20 ... 100, 200
... million words read (for a smaller track at the same shares of it), and each is tested on minimal
pairs and for surprisal.

Source: the BabyLM challenge (Warstadt et al. 2023; the checkpoints are those of its 2025 round).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from optlm.errors import ConfigError
from optlm.model import OPT
from optlm.train.loop.device import training_device
from optlm.train.parallel.alone import Alone
from optlm.train.pretrain.pairs import judge_pairs, read_pairs, read_texts, surprisal
from optlm.train.pretrain.pretrain import pretrain
from optlm.train.pretrain.recipe import PretrainConfig, expanded
from optlm.train.run.folder import data_of
from optlm.train.run.settings import build, json_object, read_settings
from optlm.train.tokens.packed import TOKENIZER, DataConfig, TokenSet, encode_documents, prepare
from optlm.train.tokens.words import WordCounter

__all__ = ["BabyConfig", "BabySettings", "milestones", "train"]

TRACKS = (10_000_000, 100_000_000)  # words
_ROWS = 1 << 20  # tokens counted at once


@dataclass(frozen=True, kw_only=True)
class BabyConfig:
    """What the protocol fixes."""

    words: int = TRACKS[0]  # most words the text may have; 10 or 100 million in the challenge
    epochs: int = 10  # times the text is read; the challenge allows 10
    pairs: str | None = None  # file of minimal pairs
    pairs_per_paradigm: int | None = None  # None: all
    surprisal: dict[str, str] = field(default_factory=dict)  # name -> file of texts
    surprisal_bytes: int = 40_000  # of each

    def __post_init__(self) -> None:
        for name in ("words", "epochs", "surprisal_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"babylm.{name} is {getattr(self, name)}; it must be at least 1")
        if self.pairs_per_paradigm is not None and self.pairs_per_paradigm < 1:
            raise ConfigError("babylm.pairs_per_paradigm must be at least 1")


@dataclass(frozen=True, kw_only=True)
class BabySettings:
    """The protocol, and all other settings as parsed JSON until the steps are known."""

    babylm: BabyConfig
    data: DataConfig
    others: dict[str, Any]

    @classmethod
    def from_file(cls, path: Path) -> BabySettings:
        """Read a JSON file.

        Raises:
            ConfigError: the file is missing, no JSON, or no valid settings.
        """
        return read_settings(path, cls.from_dict)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BabySettings:
        """Build from parsed JSON.

        Raises:
            ConfigError: unknown keys, values out of range, or steps given besides the words.
        """
        given = json_object(values, "the settings")
        babylm = build(BabyConfig, given.pop("babylm", {}), "babylm")
        if "steps" in json_object(given.get("loop", {}), "loop"):
            raise ConfigError("loop.steps follows from babylm.words and epochs; leave it out")
        others = expanded(given)
        settings = cls(
            babylm=babylm, data=DataConfig.from_dict(others.get("data", {})), others=others
        )
        settings.at(steps=1)  # every other fault is found before the data are packed
        return settings

    def at(self, *, steps: int, words: tuple[int, ...] = ()) -> PretrainConfig:
        """The settings of `optlm pretrain` for so many steps."""
        loop = {**json_object(self.others.get("loop", {}), "loop"), "steps": steps}
        return PretrainConfig.from_dict(
            {**self.others, "loop": {**loop, "keep_words": list(words)}}
        )


def milestones(track: int, total: int) -> tuple[int, ...]:
    """Counts of words at which a checkpoint stays: millions, then tens, then hundreds of them."""
    unit = min(track, TRACKS[0]) // 10
    marks: list[int] = []
    while unit and len(marks) < 1000:
        marks += [unit * count for count in range(1, 11)]
        unit *= 10
        if marks[-1] >= total:
            break
    return tuple(sorted({mark for mark in marks if mark <= total}))


def train(
    settings: BabySettings,
    out: Path,
    *,
    data_folder: Path | None = None,
    device: str = "auto",
    log: Callable[[str], None] = lambda message: None,
) -> OPT:
    """Pack the text, find the steps, train in the folder `out` or go on where it stopped.

    Raises:
        ConfigError: the text has more words than the track allows; no such device; and as
            `pretrain`.
    """
    parallel = Alone(training_device(device))
    data_folder, anew = data_of(out, data_folder)
    manifest = prepare(settings.data, data_folder, anew=anew, log=log)
    tokenizer = Tokenizer.from_file(str(data_folder / TOKENIZER))
    tokens, words = _counted(settings.data, data_folder, manifest, WordCounter(tokenizer))
    protocol = settings.babylm
    if words > protocol.words:
        raise ConfigError(
            f"the text has {words:,} words; babylm.words allows {protocol.words:,}. "
            "Use less of it: data.parts[...].max_bytes"
        )
    batch = settings.at(steps=1).batch_tokens
    steps = math.ceil(protocol.epochs * tokens / batch)
    config = settings.at(steps=steps, words=milestones(protocol.words, protocol.epochs * words))
    log(f"{words:,} words, {tokens:,} tokens; {protocol.epochs} times is {steps:,} steps")
    return pretrain(
        config,
        out,
        data_folder=data_folder,
        also=_Yardsticks(protocol, tokenizer),
        parallel=parallel,
        log=log,
    )


def _counted(
    data: DataConfig, folder: Path, manifest: dict[str, Any], counter: WordCounter
) -> tuple[int, int]:
    """Tokens and words of all parts."""
    tokens = words = 0
    for part in data.parts:
        packed = TokenSet(folder, part.name, manifest["parts"][part.name]["tokens"]).tokens
        tokens += len(packed)
        for at in range(0, len(packed), _ROWS):
            words += counter.count(packed[at : at + _ROWS].astype(np.int64)[None])
    return tokens, words


class _Yardsticks:
    """Figures of a model for the log: ``pairs`` and ``surprisal``."""

    def __init__(self, config: BabyConfig, tokenizer: Tokenizer) -> None:
        self._encode = partial(encode_documents, tokenizer)
        self._pairs = (
            read_pairs(Path(config.pairs), per_paradigm=config.pairs_per_paradigm)
            if config.pairs
            else []
        )
        self._texts = {
            name: read_texts(Path(file), config.surprisal_bytes)
            for name, file in config.surprisal.items()
        }

    def __call__(self, model: OPT) -> dict[str, Any]:
        figures: dict[str, Any] = {}
        if self._pairs:
            judged = judge_pairs(model, self._encode, self._pairs)
            figures["pairs"] = {k: v for k, v in judged.items() if k != "paradigm"}
        if self._texts:
            figures["surprisal"] = {
                name: surprisal(model, self._encode, texts) for name, texts in self._texts.items()
            }
        return figures

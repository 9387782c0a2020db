"""From a folder and a text to a model and tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from subjects import TEXT, subject

from optlm.errors import CheckpointError, ContextLengthError, RequestError
from optlm.interpret import open_subject
from variants import VARIANTS, make_state, write_checkpoint


def test_a_folder(tmp_path: Path) -> None:
    config = VARIANTS["base"]
    found = open_subject(write_checkpoint(tmp_path, config, make_state(config)))
    assert found.model.config == config
    ids = found.tokens(TEXT)
    assert ids[0] == 2
    assert "".join(found.texts(ids[1:])) == TEXT


def test_the_bundled_model() -> None:
    found = open_subject()
    assert found.name == "bundled"
    assert found.tokens("a")[0] == 2


def test_nan_weights_do_not_load(tmp_path: Path) -> None:
    state = make_state(VARIANTS["base"])
    state["model.decoder.layers.0.fc1.weight"][0, 0] = np.nan
    with pytest.raises(CheckpointError, match=r"layers\.0\.fc1\.weight"):
        open_subject(write_checkpoint(tmp_path, VARIANTS["base"], state))


def test_texts_that_cannot_be_read() -> None:
    with pytest.raises(RequestError, match="the text is empty"):
        subject("base").tokens("")
    with pytest.raises(ContextLengthError, match=r"tokens with the start token; the context is 64"):
        subject("base").tokens("rain " * 80)

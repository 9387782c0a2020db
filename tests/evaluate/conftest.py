"""Models and sets for the tests of evaluation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from made_up import write_sets

from optlm import LLM
from variants import VARIANTS, make_state, write_checkpoint


@pytest.fixture(scope="session")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of small sets in the form of the true ones."""
    return write_sets(tmp_path_factory.mktemp("sets"))


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each variant, with room for whole prompts: 512 tokens of about a letter."""
    made = {}
    for name, config in VARIANTS.items():
        wide = replace(config, max_position_embeddings=512)
        folder = tmp_path_factory.mktemp(name) / "model"
        made[name] = write_checkpoint(folder, wide, make_state(wide))
    return made


@pytest.fixture(scope="session")
def base(folders: dict[str, Path]) -> LLM:
    return LLM(str(folders["base"]), dtype="f32")

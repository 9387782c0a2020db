"""Small vocabularies in both file forms, and OPT's own where it is at hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from optlm.tokenizer import Tokenizer
from variants import tiny_tokenizer


@pytest.fixture
def json_folder(tmp_path: Path) -> Path:
    tiny_tokenizer(300).save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.fixture
def pair_folder(tmp_path: Path) -> Path:
    """The same vocabulary as vocab.json and merges.txt."""
    folder = tmp_path / "pair"
    folder.mkdir()
    tiny_tokenizer(300).model.save(str(folder))
    return folder


@pytest.fixture(scope="session")
def opt_folder(shared_dir: Path) -> Path:
    return shared_dir / "opt-tokenizer"


@pytest.fixture(scope="session")
def opt(opt_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(opt_folder)

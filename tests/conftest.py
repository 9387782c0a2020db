"""Fixtures every test folder shares."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """True OPT vocabulary, corpus and evaluation sets; skips when they are absent."""
    if not SHARED.is_dir():
        pytest.skip("no shared folder beside the repository")
    return SHARED

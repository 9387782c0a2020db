"""Files that come with the package: the bundled model."""

from __future__ import annotations

from pathlib import Path

__all__ = ["bundled_model"]


def bundled_model() -> Path:
    """Return the folder of the model that ships with optlm."""
    return Path(__file__).parent / "mini-8m"

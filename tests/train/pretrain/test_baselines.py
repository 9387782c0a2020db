"""The baselines of benchmarks/bits_per_byte.py against slow versions of their definitions."""

from __future__ import annotations

import gzip
import importlib.util
import math
from collections import Counter, defaultdict
from pathlib import Path
from types import ModuleType

import pytest
from tiny_corpus import story

SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "bits_per_byte.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bits_per_byte_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def witten_bell(training: list[str], texts: list[str]) -> float:
    """P(c | h) = (count(hc) + kinds(h) P(c | shorter h)) / (count(h) + kinds(h)), from 1 / 256."""
    follow: defaultdict[bytes, Counter[int]] = defaultdict(Counter)
    data = b"\0" * 4 + b"\0".join(text.encode() for text in training) + b"\0"
    for i in range(4, len(data)):
        for order in range(5):
            follow[data[i - order : i]][data[i]] += 1
    held_out = b"\0" * 4 + b"\0".join(text.encode() for text in texts) + b"\0"
    bits = 0.0
    for i in range(4, len(held_out)):
        p = 1 / 256
        for order in range(5):
            seen = follow.get(held_out[i - order : i])
            if seen:
                p = (seen[held_out[i]] + len(seen) * p) / (seen.total() + len(seen))
        bits -= math.log2(p) if held_out[i] else 0.0
    return bits


def test_five_grams(script: ModuleType) -> None:
    training = [story(i) for i in range(8)]
    texts = [story(20), "Grüße 猫 zebra", "", "x"]
    assert script.ngram_bits(training, texts) == pytest.approx(witten_bell(training, texts))


def test_gzip(script: ModuleType) -> None:
    assert script.gzip_bits(["a" * 50, "b"]) == 8 * len(gzip.compress(b"a" * 50 + b"\nb", 9))

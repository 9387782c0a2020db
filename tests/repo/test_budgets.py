"""Sizes of files and functions: guard rails, not goals."""

from __future__ import annotations

import ast
import statistics
from pathlib import Path

import pytest
from tree import ROOT, SOURCE, Function, files, python_files, syntax

PYTHON_LINES = 400
CPP_LINES = 650
FUNCTION_LINES = 60
MEDIAN_FUNCTION_LINES = 12


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", python_files(), ids=name)
def test_python_files(path: Path) -> None:
    assert lines(path) <= PYTHON_LINES


CPP = [path for path in files() if path.suffix in {".cc", ".h", ".inl"}]


@pytest.mark.parametrize("path", CPP, ids=name)
def test_cpp_files(path: Path) -> None:
    assert lines(path) <= CPP_LINES


def bodies() -> dict[str, int]:
    """Lines of the body of every function in `src`, docstring and signature not counted."""
    sizes = {}
    for path in python_files(SOURCE):
        for node in ast.walk(syntax(path)):
            if isinstance(node, Function):
                body = node.body[1:] if ast.get_docstring(node) and node.body[1:] else node.body
                size = (node.end_lineno or 0) - body[0].lineno + 1
                sizes[f"{name(path)}:{node.lineno} {node.name}"] = size
    return sizes


def test_functions() -> None:
    sizes = bodies()
    long = {where: size for where, size in sizes.items() if size > FUNCTION_LINES}
    assert not long
    assert statistics.median(sizes.values()) < MEDIAN_FUNCTION_LINES

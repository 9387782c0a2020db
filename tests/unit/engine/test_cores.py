"""Threads are counted within the container's share of the machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from optlm.engine.cores import available_threads

CORES = len(os.sched_getaffinity(0))


def test_without_a_limit(tmp_path: Path) -> None:
    assert available_threads(tmp_path / "nowhere") == CORES


@pytest.mark.parametrize(
    ("text", "threads"),
    [
        ("max 100000", CORES),
        ("100000 100000", 1),
        ("50000 100000", 1),
        ("100001 100000", min(2, CORES)),
        ("-1 100000", CORES),
        ("0 0", CORES),
        ("nan 1", CORES),
        ("inf 1", CORES),
        ("", CORES),
        ("x y z", CORES),
        ("99999999999999 1", CORES),
    ],
)
def test_quota(text: str, threads: int, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text(text + "\n")
    assert available_threads(tmp_path) == threads


@pytest.mark.parametrize(("quota", "threads"), [(-1, CORES), (90000, 1), (10**9, CORES)])
def test_quota_in_the_older_form(quota: int, threads: int, tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert available_threads(tmp_path) == threads

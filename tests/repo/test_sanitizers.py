"""The core's tests once more, on a build with the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("optlm._core", reason="the compiled core is not built")

REPOSITORY = Path(__file__).resolve().parents[2]


def run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def runtime(name: str) -> str:
    found = run("g++", f"-print-file-name={name}").strip()
    if not Path(found).is_absolute():
        pytest.skip(f"{name} is not installed")
    return found


def test_core_under_sanitizers(tmp_path: Path) -> None:
    cmake = shutil.which("cmake")
    if cmake is None or shutil.which("g++") is None:
        pytest.skip("needs cmake and g++")
    preload = " ".join(runtime(name) for name in ("libasan.so", "libstdc++.so"))
    build, package = tmp_path / "build", tmp_path / "package"
    run(
        cmake, "-S", REPOSITORY, "-B", build, f"-DPython_EXECUTABLE={sys.executable}",
        "-DOPTLM_SANITIZE=ON", "-DOPTLM_WERROR=ON",
    )  # fmt: skip
    run(cmake, "--build", build, "--parallel", "2")
    source = REPOSITORY / "src" / "optlm"
    shutil.copytree(source, package / "optlm", ignore=shutil.ignore_patterns("_core*.so"))
    core = next(build.glob("_core*.so"))
    shutil.copy(core, package / "optlm")
    out = run(
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/unit/core",
        "tests/parity/test_native_model.py",
        "-k", "not company and not outlier",  # many examples, the same code paths
        PYTHONPATH=str(package),
        LD_PRELOAD=preload,
        ASAN_OPTIONS="detect_leaks=0",  # the interpreter's own are many
        UBSAN_OPTIONS="print_stacktrace=1",
    )  # fmt: skip
    assert " passed" in out

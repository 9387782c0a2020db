"""A wheel builds and runs in an environment that holds nothing but the declared dependencies.

No network: the dependencies are linked from this environment, following the wheel's own metadata.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from tree import ROOT

from variants import VARIANTS, make_state, write_checkpoint

pytestmark = pytest.mark.slow


def build(out: Path, environment: Mapping[str, str], *options: str) -> Path:
    """Build a wheel of the repository with this environment's own build tools."""
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", str(ROOT), "--quiet", "--no-deps", *options,
         "--no-build-isolation", "--disable-pip-version-check", "--wheel-dir", str(out)],
        env=environment, check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = out.glob("*.whl")
    return wheel


def dependencies(requirements: list[str]) -> Iterator[metadata.Distribution]:
    """The distributions that `requirements` lead to, extras left out."""
    waiting, seen = list(requirements), set()
    while waiting:
        requirement = Requirement(waiting.pop())
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if wanted and requirement.name not in seen:
            seen.add(requirement.name)
            found = metadata.distribution(requirement.name)
            yield found
            waiting += found.requires or []


def install(wheel: Path, folder: Path) -> Path:
    """Make an environment of the wheel and its dependencies; return its interpreter."""
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (info,) = site.glob("*.dist-info")
    requires = metadata.PathDistribution(info).requires or []
    for found in dependencies(requires):
        for name in {file.parts[0] for file in found.files or () if file.parts[0] != ".."}:
            if not (site / name).exists() and name != "__pycache__":
                (site / name).symlink_to(Path(str(found.locate_file(name))))
    return folder / "bin" / "python"


def optlm(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [python, "-m", "optlm", *arguments], env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = VARIANTS["base"]
    return write_checkpoint(tmp_path_factory.mktemp("wheel") / "model", config, make_state(config))


def test_wheel_runs_without_torch(tmp_path: Path, model: Path) -> None:
    wheel = build(tmp_path / "wheel", os.environ, "--config-settings=build-dir=build/test-wheel")
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.startswith("optlm/_core.") and name.endswith(".so") for name in names)
    assert any(name.startswith("optlm/assets/mini-8m/") for name in names)
    assert not any(name.startswith(("tests", "csrc")) for name in names)
    python = install(wheel, tmp_path / "clean")
    text = optlm(python, "generate", "the cat", "--max-tokens", "5", "--temperature", "0")
    assert (text.returncode, text.stderr) == (0, "")
    other = optlm(python, "generate", "the cat", "--model", str(model), "--max-tokens", "5")
    assert (other.returncode, other.stderr) == (0, "")
    refused = optlm(python, "pretrain", "run.json", "--out", "run")
    assert refused.returncode == 1
    assert "pip install 'optlm[train]'" in refused.stderr


def test_without_a_compiler_the_install_is_pure_python(tmp_path: Path, model: Path) -> None:
    tools = tmp_path / "tools"  # a PATH with everything the build needs but a compiler
    tools.mkdir()
    for tool in ("cmake", "ninja"):
        if found := shutil.which(tool):
            (tools / tool).symlink_to(found)
    environment = dict(os.environ, PATH=str(tools), CXX="no-such-compiler", CC="no-such-compiler")
    wheel = build(
        tmp_path / "wheel", environment, f"--config-settings=build-dir={tmp_path / 'build'}"
    )
    assert wheel.name.endswith("-py3-none-any.whl")
    python = install(wheel, tmp_path / "clean")
    assert optlm(python, "info", str(model)).returncode == 0
    refused = optlm(python, "generate", "x", "--model", str(model))
    assert refused.returncode == 1
    assert len(refused.stderr.splitlines()) == 1
    assert "compiler" in refused.stderr
    assert "optlm[train]" in refused.stderr


def test_the_core_is_here_where_a_compiler_is() -> None:
    """A core that fails to compile must not hide behind the pure Python fallback."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler on this machine")
    from optlm import _core

    assert _core.instruction_set()

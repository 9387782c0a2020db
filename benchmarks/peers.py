"""The environments of the other engines: `python benchmarks/peers.py install`.

`peers.txt` pins what each holds. They live in `.peers/` of the repository, or in $OPTLM_PEERS.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

PINS = Path(__file__).with_name("peers.txt")
# Pulled in as dependencies, but built against another PyTorch: importing them fails.
UNWANTED = ("torchvision", "torchaudio", "torchcodec")


def home() -> Path:
    """Folder of the environments."""
    given = os.environ.get("OPTLM_PEERS")
    return Path(given) if given else Path(__file__).resolve().parents[1] / ".peers"


def binary(environment: str, name: str = "python") -> Path:
    """Path of a program of one environment, there or not."""
    return home() / environment / "bin" / name


def read_pins(text: str) -> dict[str, list[str]]:
    """Requirements by environment: ``[name]`` begins one, ``#`` a comment."""
    pins: dict[str, list[str]] = {}
    name = ""
    for line in (line.partition("#")[0].strip() for line in text.splitlines()):
        if line.startswith("["):
            name = line.strip("[]")
            pins[name] = []
        elif line:
            pins[name].append(line)
    return pins


def install(environment: str, requirements: list[str]) -> None:
    """Create one environment, or bring it to its pins; PyTorch first, so that its build stays."""
    python = binary(environment)
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", home() / environment], check=True)
    pip: list[str | Path] = [python, "-m", "pip", "--disable-pip-version-check"]
    torch = [line for line in requirements if line.startswith("torch==")]
    for wanted in (torch, requirements):
        subprocess.run([*pip, "install", "--quiet", *wanted], check=True)
    subprocess.run([*pip, "uninstall", "--quiet", "--yes", *UNWANTED], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["install"])
    parser.parse_args()
    for environment, requirements in read_pins(PINS.read_text(encoding="utf-8")).items():
        print(f"{environment}: {', '.join(requirements)}", flush=True)
        install(environment, requirements)
    print(f"installed in {home()}")


if __name__ == "__main__":
    main()

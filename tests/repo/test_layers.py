"""Imports go down only, and PyTorch stays where it belongs (docs/architecture.md)."""

from __future__ import annotations

from pathlib import Path

import pytest
from tree import SOURCE, imports, module_name, python_files

# Top-level parts by layer; a part may import lower layers and itself.
LAYERS = (
    {"errors"},
    {"config", "assets"},
    {"tokenizer", "checkpoint"},
    {"_core"},
    {"engine", "model", "data"},
    {"score"},
    {"train", "interpret", "uncertainty"},
    {"evaluate", "serve"},
    {"batch"},
    {"cli"},
)
HEIGHT = {part: height for height, parts in enumerate(LAYERS) for part in parts}
MAY_USE_TORCH = (
    "optlm.model", "optlm.train", "optlm.engine.torch_", "optlm.interpret",
    "optlm.uncertainty.dropout",
)  # fmt: skip
# The engine's second backend runs the reference model: the only imports between siblings.
ALLOWED = {("optlm.engine.torch_runner", "model"), ("optlm.engine.torch_prefix", "model")}

FILES = [path for path in python_files(SOURCE) if path.parent != SOURCE or path.stem[0] != "_"]


def part(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_down(path: Path) -> None:
    module = module_name(path)
    mine = part(module)
    assert mine in HEIGHT, f"{module} has no layer: give it one here and in docs/architecture.md"
    wanted = {part(name) for name in imports(path) if name.startswith("optlm.")}
    wrong = {
        other
        for other in wanted - {mine, "__version__"}
        if HEIGHT[other] >= HEIGHT[mine] and (module, other) not in ALLOWED
    }
    assert not wrong, f"{module} imports {sorted(wrong)}, which is not below it"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_only_some_parts_know_torch(path: Path) -> None:
    if not module_name(path).startswith(MAY_USE_TORCH):
        heavy = {"torch", "transformers", "matplotlib"}
        assert not heavy & {name.split(".")[0] for name in imports(path)}


def test_torch_free_modules_import_torch_parts_on_use_only() -> None:
    for path in FILES:
        module = module_name(path)
        if not module.startswith(MAY_USE_TORCH):
            wrong = {n for n in imports(path, at_import=True) if n.startswith(MAY_USE_TORCH)}
            assert not wrong, f"{module} imports {sorted(wrong)} at its head"


# Rooms of training that know nothing of the techniques, and what each technique builds on.
TECHNIQUES = {"finetune": set(), "pretrain": set(), "distil": {"pretrain"}}


@pytest.mark.parametrize("path", python_files(SOURCE / "train"), ids=module_name)
def test_the_loop_knows_no_technique(path: Path) -> None:
    room = path.relative_to(SOURCE / "train").parts[0]
    wanted = {n.split(".")[2] for n in imports(path) if n.startswith("optlm.train.")}
    techniques = wanted & set(TECHNIQUES) - {room}
    assert techniques <= TECHNIQUES.get(room, set())


def test_every_layer_named_here_is_in_the_architecture_page() -> None:
    page = (SOURCE.parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
    missing = {name for name in HEIGHT if name not in page}
    assert not missing

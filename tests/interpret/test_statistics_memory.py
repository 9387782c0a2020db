"""Head statistics take less than 1.2 times the memory of a plain forward pass, at 2,048 tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json, sys
from pathlib import Path
import torch
from optlm.config import OPTConfig
from optlm.interpret import head_statistics, visit_attention
from optlm.model import OPT

torch.set_num_threads(1)
config = OPTConfig(vocab_size=2048, hidden_size=96, num_hidden_layers=2, ffn_dim=384,
                   num_attention_heads=12, max_position_embeddings=2048)
model, tokens = OPT(config).eval(), [2, *range(2047)]
tasks = {
    "forward": lambda: model(torch.tensor([tokens])),
    "statistics": lambda: head_statistics(model, [tokens]),
    "dense": lambda: visit_attention(model, tokens, lambda layer, maps: None),
}

def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])

grown = {}
with torch.no_grad():
    head_statistics(model, [tokens[:70]])
    for name, task in tasks.items():
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = resident("VmRSS:")
        task()
        grown[name] = resident("VmHWM:") - before
print(json.dumps(grown))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_peak_memory() -> None:
    # Tensors come and go with their pages, so that one task does not run in what another left.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    grown = json.loads(done.stdout)  # kB above what was there before
    assert grown["statistics"] < 1.2 * grown["forward"], grown
    assert grown["dense"] > 2 * grown["statistics"], grown  # what the test would catch

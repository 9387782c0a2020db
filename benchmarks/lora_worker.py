"""One way of LoRA training in a process of its own: JSON lines in, one line back for each.

Runs with the Python of its own environment. Both train the same changes of the same 125M weights on
the same rows of random tokens with AdamW; one request is some steps, the clock around all of them.

    {"op": "load", "folder": ..., "threads": 2, "rows": 2, "length": 256,
     "vocabulary": 50265} -> {"packages": {...}}
    {"op": "train", "steps": 2} -> {"seconds": 1.2, "loss": 10.9}
    {"op": "memory"} -> {"peak": ...}
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib import metadata
from typing import Any

import numpy as np
import torch

from worker import memory

RANK, ALPHA, TARGETS, RATE = 8, 16, ["q_proj", "v_proj"], 2e-4


def rows_of(step: int, rows: int, length: int, vocabulary: int) -> list[list[int]]:
    """Token ids of one step, (rows, length + 1)."""
    random = np.random.default_rng([9, step])
    tokens: list[list[int]] = random.integers(4, vocabulary, (rows, length + 1)).tolist()
    return tokens


class Optlm:
    """The steps of `optlm finetune`."""

    packages = ("torch", "peft")

    def load(self, folder: str, rows: int, length: int, vocabulary: int) -> None:
        from pathlib import Path
        from tempfile import mkdtemp

        from optlm.model import OPT
        from optlm.train.finetune.adapters import Adapted, AdapterConfig, attach
        from optlm.train.finetune.examples import Example
        from optlm.train.finetune.packing import make_rows
        from optlm.train.loop.optim import OptimConfig
        from optlm.train.loop.trainer import LoopConfig, Trainer
        from optlm.train.run.folder import RunFolder

        config = AdapterConfig(rank=RANK, alpha=ALPHA, target_modules=tuple(TARGETS))
        optim = OptimConfig(learning_rate=RATE, warmup_steps=0, weight_decay=0.0)
        sizes = (rows, length, vocabulary)
        self.trainer = Trainer(
            attach(OPT.from_checkpoint(folder), config, torch.tensor([2])),
            config=LoopConfig(steps=10**6, average_decay=0.0, optim=optim),
            folder=RunFolder(Path(mkdtemp())),
            batches=lambda step: [
                make_rows([[Example(row)] for row in rows_of(step, *sizes)], pad=1)
            ],
            loss=Adapted.loss,
            evaluate=lambda model: {"score": 0.0},
        )
        self.trainer.model.train()

    def train(self, steps: int) -> float:
        return [self.trainer._one_step() for _ in range(steps)][-1].loss


class Peft:
    """peft on transformers' OPT, in a plain loop with fused AdamW."""

    packages = ("torch", "peft", "transformers")

    def load(self, folder: str, rows: int, length: int, vocabulary: int) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import OPTForCausalLM

        base = OPTForCausalLM.from_pretrained(folder, dtype=torch.float32)
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
        self.model = get_peft_model(base, config).train()
        self.weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=RATE, weight_decay=0.0, fused=True)
        self.sizes, self.done = (rows, length, vocabulary), 0

    def train(self, steps: int) -> float:
        for _ in range(steps):
            tokens = torch.tensor(rows_of(self.done, *self.sizes))
            loss = self.model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.done += 1
        return float(loss.detach())


WAYS = {"optlm": Optlm, "peft": Peft}


def answer(way: Any, request: dict[str, Any]) -> dict[str, Any]:
    op = request.pop("op")
    if op == "load":
        torch.set_num_threads(request.pop("threads"))
        torch.manual_seed(0)
        way.load(**request)
        return {"packages": {name: metadata.version(name) for name in way.packages}}
    if op == "memory":
        return dict(memory())
    start = time.perf_counter()
    loss = way.train(request["steps"])
    return {"seconds": time.perf_counter() - start, "loss": loss}


def main() -> None:
    way = WAYS[sys.argv[1]]()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not mix with the replies
    for line in sys.stdin:
        try:
            reply = answer(way, json.loads(line))
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()

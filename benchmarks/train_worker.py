"""One training loop in a process of its own: JSON lines on standard input, one line back for each.

Runs with the Python of the loop's own environment. Every loop trains the same shape on the same
rows of random tokens; one request is some optimizer steps, the clock around all of them.

    {"op": "load", "form": "bf16", "threads": 2, "rows": 16, "length": 256}  -> {"packages": {...}}
    {"op": "train", "steps": 4} -> {"seconds": 1.2, "loss": 9.01}
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib import metadata
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch

SHAPE = {"vocab": 8192, "width": 256, "layers": 8, "heads": 4, "context": 1024}
RATE, DECAY, BETAS, CLIP = 1e-3, 0.1, (0.9, 0.95), 1.0


def rows_of(step: int, rows: int, length: int) -> Any:
    """(rows, length + 1) token ids of one step."""
    random = np.random.default_rng([7, step])
    return torch.from_numpy(random.integers(4, SHAPE["vocab"], (rows, length + 1)))


def opt_settings() -> dict[str, Any]:
    return {
        "vocab_size": SHAPE["vocab"],
        "hidden_size": SHAPE["width"],
        "num_hidden_layers": SHAPE["layers"],
        "ffn_dim": 4 * SHAPE["width"],
        "num_attention_heads": SHAPE["heads"],
        "max_position_embeddings": SHAPE["context"],
        "dropout": 0.0,
        "attention_dropout": 0.0,
    }


# ---- ours ----------------------------------------------------------------------------------------


class Optlm:
    """The loop of `optlm pretrain`, one `Trainer` for all requests."""

    packages = ("torch",)

    def load(self, form: str, rows: int, length: int) -> None:
        from pathlib import Path
        from tempfile import mkdtemp

        from optlm.config import OPTConfig
        from optlm.model import OPT
        from optlm.train.loop.device import autocast
        from optlm.train.loop.forward import Forward
        from optlm.train.loop.loss import head_cross_entropy
        from optlm.train.loop.optim import OptimConfig
        from optlm.train.loop.trainer import LoopConfig, Loss, Trainer
        from optlm.train.run.folder import RunFolder

        forward = Forward(compiled=form.endswith("compiled"))

        def loss(model: OPT, tokens: Any) -> Loss:
            targets = tokens[:, 1:].reshape(-1)
            with autocast("bf16", tokens.device):
                hidden, sizes = forward(model, tokens[:, :-1])
                total = head_cross_entropy(hidden.flatten(0, 1), model.head_weight, targets)
            return Loss(total, len(targets), activations=sizes)

        optim = OptimConfig(learning_rate=RATE, warmup_steps=0, decay_share=0.0)
        self.trainer = Trainer(
            OPT(OPTConfig(**opt_settings())),
            config=LoopConfig(steps=10**6, average_decay=0.0, optim=optim),
            folder=RunFolder(Path(mkdtemp())),
            batches=lambda step: [rows_of(step, rows, length)],
            loss=loss,
            evaluate=lambda model: {"score": 0.0},
        )
        self.trainer.model.train()

    def train(self, steps: int) -> float:
        return [self.trainer._one_step() for _ in range(steps)][-1].loss


# ---- transformers' Trainer
# -------------------------------------------------------------------------


class Transformers:
    """`transformers.Trainer` on `OPTForCausalLM`: bf16 autocast and fused AdamW."""

    packages = ("torch", "transformers", "accelerate")

    def load(self, form: str, rows: int, length: int) -> None:
        import transformers

        config = transformers.OPTConfig(**opt_settings(), word_embed_proj_dim=SHAPE["width"])
        self.model = transformers.OPTForCausalLM(config)
        self.rows, self.length, self.done = rows, length, 0
        self.library = transformers

    def train(self, steps: int) -> float:
        from tempfile import TemporaryDirectory

        first, rows, length = self.done, self.rows, self.length
        self.done += steps

        class Rows(torch.utils.data.IterableDataset):  # type: ignore[misc]
            def __iter__(self) -> Any:
                for step in range(first, first + steps):
                    for row in rows_of(step, rows, length)[:, :-1]:
                        yield {"input_ids": row, "labels": row}

        class Timed(self.library.TrainerCallback):  # type: ignore[misc, name-defined]
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                self.started = time.perf_counter()

            def on_train_end(self, *_: Any, **__: Any) -> None:
                self.seconds = time.perf_counter() - self.started

        timed = Timed()
        with TemporaryDirectory() as folder:
            arguments = self.library.TrainingArguments(
                output_dir=folder, max_steps=steps, per_device_train_batch_size=rows, bf16=True,
                use_cpu=True, optim="adamw_torch_fused", learning_rate=RATE, weight_decay=DECAY,
                adam_beta1=BETAS[0], adam_beta2=BETAS[1], max_grad_norm=CLIP,
                lr_scheduler_type="constant", report_to="none", save_strategy="no",
                logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
            )  # fmt: skip
            trainer = self.library.Trainer(
                self.model, arguments, train_dataset=Rows(), callbacks=[timed]
            )
            loss = trainer.train().training_loss
        self.seconds = timed.seconds  # without what the Trainer builds before its loop
        return float(loss)


# ---- a plain loop
# ----------------------------------------------------------------------------------


class Block(torch.nn.Module):
    """A pre-norm block with one product for query, key and value."""

    def __init__(self) -> None:
        super().__init__()
        d = SHAPE["width"]
        self.first, self.second = torch.nn.LayerNorm(d), torch.nn.LayerNorm(d)
        self.attend, self.mix = torch.nn.Linear(d, 3 * d), torch.nn.Linear(d, d)
        self.up, self.down = torch.nn.Linear(d, 4 * d), torch.nn.Linear(4 * d, d)

    def forward(self, x: Any) -> Any:
        b, t, d = x.shape
        parts = self.attend(self.first(x)).split(d, dim=2)
        q, k, v = (p.view(b, t, SHAPE["heads"], -1).transpose(1, 2) for p in parts)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mix(y.transpose(1, 2).reshape(b, t, d))
        return x + self.down(torch.nn.functional.gelu(self.up(self.second(x))))


class Gpt(torch.nn.Module):
    """A GPT-2 of the same shape, with a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.token = torch.nn.Embedding(SHAPE["vocab"], SHAPE["width"])
        self.place = torch.nn.Embedding(SHAPE["context"], SHAPE["width"])
        self.blocks = torch.nn.ModuleList(Block() for _ in range(SHAPE["layers"]))
        self.norm = torch.nn.LayerNorm(SHAPE["width"])
        self.head = torch.nn.Linear(SHAPE["width"], SHAPE["vocab"], bias=False)
        for weight in self.parameters():
            if weight.ndim == 2:
                torch.nn.init.normal_(weight, std=0.02)
        self.head.weight = self.token.weight

    def forward(self, tokens: Any, targets: Any) -> Any:
        x = self.token(tokens) + self.place(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Plain:
    """A loop in the manner of nanoGPT: autocast to bf16, fused AdamW, clipping, all in the open."""

    packages = ("torch",)

    def load(self, form: str, rows: int, length: int) -> None:
        model = Gpt().train()
        matrices = [p for p in model.parameters() if p.ndim >= 2]
        others = [p for p in model.parameters() if p.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": DECAY},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, fused=True)
        self.parameters = list(model.parameters())
        self.model = torch.compile(model) if form.endswith("compiled") else model
        self.rows, self.length, self.done = rows, length, 0

    def train(self, steps: int) -> float:
        for _ in range(steps):
            tokens = rows_of(self.done, self.rows, self.length)
            with torch.autocast("cpu", torch.bfloat16):
                loss = self.model(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.done += 1
        return float(loss.detach())


LOOPS = {"optlm": Optlm, "transformers": Transformers, "plain": Plain}


def answer(loop: Any, request: dict[str, Any]) -> dict[str, Any]:
    if request["op"] == "load":
        torch.set_num_threads(request["threads"])
        torch.manual_seed(0)
        loop.load(request["form"], request["rows"], request["length"])
        return {"packages": {name: metadata.version(name) for name in loop.packages}}
    start = time.perf_counter()
    loss = loop.train(request["steps"])
    seconds = time.perf_counter() - start
    return {"seconds": getattr(loop, "seconds", seconds), "loss": loss}


def main() -> None:
    loop = LOOPS[sys.argv[1]]()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not mix with the replies
    for line in sys.stdin:
        try:
            reply = answer(loop, json.loads(line))
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()

"""Quality at equal size, data and tokens: a run of `optlm pretrain` beside nanoGPT's recipe.

    python benchmarks/nanogpt.py --run RUN --data DATA --corpus CORPUS --rate 1e-3 [--state FILE]

RUN is a finished run, DATA its packed tokens, CORPUS the folder with DOMAIN.valid.jsonl.zst. A
GPT-2 of the same width, depth and vocabulary (GELU, tied head, residual products drawn smaller by
sqrt(2 L)) reads the very rows of the run in the same order, trained as nanoGPT does: AdamW
(0.9, 0.95), weight decay 0.1 on matrices, clipping at 1, warm-up of 100 steps, a cosine down to a
tenth, autocast to bfloat16. It does not keep a moving average, as nanoGPT does not. Both are then
judged in float32 on the same held-out documents, in windows of the context. With --state the
training can be stopped and goes on from there.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Tokenizer

from optlm.model import OPT
from optlm.train.pretrain.pretrain import PretrainConfig, training_mixture
from optlm.train.run.export import export_run
from optlm.train.tokens.corpus import ReadReport, read_documents
from optlm.train.tokens.packed import encode_documents, read_manifest
from report import Report
from train_worker import CLIP, DECAY, SHAPE, Gpt

WARMUP, FINAL = 100, 0.1
SAVE_EVERY = 200
Documents = dict[str, tuple[list[list[int]], int]]  # by domain: token ids, and bytes of text


def main() -> int:
    options = arguments()
    settings = json.loads((options.run / "run.json").read_text())
    config = PretrainConfig.from_dict({key: settings[key] for key in fields(settings)})
    check_shape(config)
    tokenizer = Tokenizer.from_file(str(options.run / "tokenizer.json"))
    documents = held_out(options.corpus, tokenizer, options.bytes)
    with TemporaryDirectory() as folder:
        export_run(options.run, Path(folder), dtype="bf16")
        ours = OPT.from_checkpoint(Path(folder))
    gpt, seconds = train(config, options)
    rows = [
        row("optlm", sum(p.numel() for p in ours.parameters()), opt_nats(ours), documents),
        row("nanoGPT", sum(p.numel() for p in gpt.parameters()), gpt_nats(gpt), documents),
    ]
    report(options, rows, config.loop.steps * config.batch_tokens, seconds)
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run")
    parser.add_argument("--data", type=Path, required=True, help="its packed tokens")
    parser.add_argument("--corpus", type=Path, required=True, help="folder of the held-out text")
    parser.add_argument("--rate", type=float, default=1e-3, help="nanoGPT's peak learning rate")
    parser.add_argument("--state", type=Path, help="file that keeps the training's state")
    parser.add_argument("--bytes", type=int, default=300_000, help="held-out text of each domain")
    parser.add_argument("--name", help="name of the result files (nanogpt)")
    parser.add_argument("--json", help="write the JSON line here too")
    parser.add_argument(
        "--results", type=Path, default=Path(__file__).parent / "results", help="folder"
    )
    return parser.parse_args()


def fields(settings: dict[str, Any]) -> list[str]:
    return [name for name in PretrainConfig.__dataclass_fields__ if name in settings]


def check_shape(config: PretrainConfig) -> None:
    model = config.model
    shape = {
        "vocab": model.vocab_size,
        "width": model.hidden_size,
        "layers": model.num_hidden_layers,
        "heads": model.num_attention_heads,
        "context": model.max_position_embeddings,
    }
    if shape != SHAPE:
        sys.exit(f"the run's shape is {shape}; the GPT-2 here is {SHAPE}")


# ---- training nanoGPT's way --------------------------------------------------------------------


def train(config: PretrainConfig, options: argparse.Namespace) -> tuple[Gpt, float]:
    torch.manual_seed(config.seed)
    model = Gpt().train()
    draw_residual_products_smaller(model)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": DECAY},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=options.rate, betas=(0.9, 0.95), fused=True)
    done, before = resume(options.state, model, optimizer)
    mixture = training_mixture(config, options.data, read_manifest(options.data))
    start = time.perf_counter()
    for step in range(done, config.loop.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, config.loop.steps, options.rate)
        rows = torch.from_numpy(mixture.batch(step))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(rows[:, :-1], rows[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == config.loop.steps:
            seconds = before + time.perf_counter() - start
            print(f"step {step + 1}: loss {float(loss):.3f}, {seconds:.0f} s", file=sys.stderr)
            save(options.state, model, optimizer, step + 1, seconds)
    return model.eval(), before + time.perf_counter() - start


def draw_residual_products_smaller(model: Gpt) -> None:
    for block in model.blocks:
        for product in (block.mix, block.down):
            torch.nn.init.normal_(product.weight, std=0.02 / math.sqrt(2 * SHAPE["layers"]))
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.bias is not None:
            torch.nn.init.zeros_(module.bias)


def rate_at(step: int, steps: int, peak: float) -> float:
    if step < WARMUP:
        return peak * (step + 1) / (WARMUP + 1)
    done = (step - WARMUP) / max(1, steps - WARMUP)
    return peak * (FINAL + (1 - FINAL) * 0.5 * (1 + math.cos(math.pi * done)))


def resume(state: Path | None, model: Gpt, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    if state is None or not state.exists():
        return 0, 0.0
    held = torch.load(state, weights_only=True)
    model.load_state_dict(held["model"])
    optimizer.load_state_dict(held["optimizer"])
    return held["step"], held["seconds"]


def save(
    state: Path | None, model: Gpt, optimizer: torch.optim.Optimizer, step: int, seconds: float
) -> None:
    if state is not None:
        part = state.with_suffix(".part")
        held = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(held | {"step": step, "seconds": seconds}, part)
        part.replace(state)


# ---- judging both ------------------------------------------------------------------------------


def held_out(corpus: Path, tokenizer: Tokenizer, limit: int) -> Documents:
    documents = {}
    for file in sorted(corpus.glob("*.valid.jsonl.zst")):
        texts = list(read_documents(file, ReadReport(), max_bytes=limit))
        size = sum(len(text.encode()) for text in texts)
        domain = file.name.removesuffix(".valid.jsonl.zst")
        documents[domain] = (list(encode_documents(tokenizer, texts)), size)
    return documents


def opt_nats(model: OPT) -> Callable[[torch.Tensor], float]:
    def nats(ids: torch.Tensor) -> float:
        logits = model(ids[None, :-1]).logits[0]
        return float(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))

    return nats


def gpt_nats(model: Gpt) -> Callable[[torch.Tensor], float]:
    def nats(ids: torch.Tensor) -> float:
        return float(model(ids[None, :-1], ids[None, 1:])) * (len(ids) - 1)

    return nats


@torch.no_grad()
def row(
    name: str, parameters: int, nats: Callable[[torch.Tensor], float], documents: Documents
) -> dict[str, Any]:
    bits = {}
    context = SHAPE["context"]
    for domain, (texts, size) in documents.items():
        windows = (
            torch.tensor(ids[begin : begin + context + 1])
            for ids in texts
            for begin in range(0, len(ids) - 1, context)
        )
        bits[domain] = sum(nats(window) for window in windows) / math.log(2) / size
    mean = sum(bits.values()) / len(bits)
    return {"model": name, "parameters": parameters, **bits, "mean": mean}


def report(
    options: argparse.Namespace, rows: list[dict[str, Any]], tokens: int, seconds: float
) -> None:
    ours, theirs = (row["mean"] for row in rows)
    Report(
        name="nanogpt",
        title="Bits per byte at equal size, data and tokens",
        method=(
            f"{tokens:,} training tokens, the same rows in the same order; nanoGPT's recipe with a "
            f"peak rate of {options.rate:g}. Held-out text, up to {options.bytes:,} bytes a domain."
        ),
        rows=rows,
        columns={key: key.replace("_", " ") for key in rows[0]},
        headline={"optlm / nanoGPT": ours / theirs, "seconds of nanoGPT": round(seconds)},
        packages={"torch": torch.__version__},
    ).publish(options)


if __name__ == "__main__":
    sys.exit(main())

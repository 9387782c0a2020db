"""Few-shot evaluation: lm-evaluation-harness on our engine beside its own hf model.

    python benchmarks/fewshot.py --data DIR [--model FOLDER]

DIR holds hellaswag.jsonl (docs/evaluation.md). Each round takes items of its own, so no cache of an
earlier round helps, and all sides answer the same requests of the harness, one after another. The
clock runs from the texts to the answers. The figures of both sides must agree. "Work" counts two
operations for each weight of the layers and each token that our float32 reads, and of the head for
each token of an ending; torch's own products of 1,024 tokens tell what the machine gives.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import checkpoints
import report

AGREE = 1e-3  # nats of a request, in float32
SIDES = ("hf-f32", "hf-bf16", "optlm-f32", "optlm-int8")


def main() -> int:
    wanted = arguments()
    folder = Path(wanted.model) if wanted.model else checkpoints.checkpoint("125m")
    sides = {name: load(name, folder, wanted.threads) for name in SIDES}
    rows, worst = [], 0.0
    rates: dict[str, float] = {}
    for shots, count in ((0, wanted.items), (5, max(wanted.items // 4, 1))):
        seconds: dict[str, list[float]] = {name: [] for name in SIDES}
        for number in range(wanted.rounds):
            requests = requests_of(wanted.data, sides["optlm-f32"], shots, count, number)
            answers = {}
            for name, lm in sides.items():
                read = lm.scorer.num_forward_tokens if name == "optlm-f32" else 0
                start = time.perf_counter()
                answers[name] = ask(lm, requests)
                seconds[name].append(time.perf_counter() - start)
                if name == "optlm-f32":
                    work = work_of(lm, requests, lm.scorer.num_forward_tokens - read)
                    key = f"work of optlm-f32, {shots} shots, GFLOP/s"
                    rates[key] = max(rates.get(key, 0.0), work / seconds[name][-1] / 1e9)
            for form in ("float32", "bfloat16"):
                key = f"torch's products in {form}, GFLOP/s"
                rates[key] = max(rates.get(key, 0.0), product_rate(form) / 1e9)
            print(f"round {number + 1}, {shots} shots", file=sys.stderr)
            pairs = zip(answers["hf-f32"], answers["optlm-f32"], strict=True)
            worst = max(worst, *(abs(a[0] - b[0]) for a, b in pairs))
        base = statistics.median(seconds["hf-f32"])
        for name in SIDES:
            middle = statistics.median(seconds[name])
            rows.append(
                {"shots": shots, "side": name, "items_s": count / middle, "times": base / middle}
            )
    told = {f"{row['side']}, {row['shots']} shots, times hf-f32": row["times"] for row in rows}
    report.Report(
        name="fewshot",
        title="HellaSwag through lm-evaluation-harness, 125M shape",
        method=(__doc__ or "").split("\n\n", 2)[2].strip(),
        rows=rows,
        columns={
            "shots": "shots",
            "side": "model class",
            "items_s": "items/s",
            "times": "x hf-f32",
        },
        headline={**told, **rates, "worst disagreement in float32, nats": worst},
        packages=versions("lm-eval", "transformers", "torch"),
    ).publish(wanted)
    return 0 if worst < AGREE else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the evaluation sets")
    parser.add_argument("--model", help="checkpoint folder (random weights of the 125M shape)")
    parser.add_argument("--items", type=int, default=16, help="a round without shots (16)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", default=str(Path(__file__).with_name("results")))
    parser.add_argument("--name", help="of the result files")
    parser.add_argument("--json", help="also write the JSON line here")
    return parser.parse_args()


def load(name: str, folder: Path, threads: int) -> Any:
    """One side; `ask` puts requests to it."""
    kind, form = name.split("-")
    if kind == "optlm":
        from optlm.evaluate.harness import EngineLM

        return EngineLM(str(folder), dtype=form, threads=threads)
    import torch
    import transformers
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(threads)
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[form]
    model = transformers.OPTForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, logits_cache=False)


def requests_of(data: Path, lm: Any, shots: int, count: int, number: int) -> list[Any]:
    """The requests of items that no other round has."""
    from optlm.evaluate.protocol import ProtocolTask
    from optlm.evaluate.tasks import TASKS

    encode = lm.scorer.tokenizer.encode
    task = ProtocolTask(
        TASKS["hellaswag"],
        data,
        num_fewshot=shots,
        encode=lambda text: encode(text, add_bos=False),
        context=lm.max_length,
    )
    task.set_fewshot_seed(number)
    first = (2 * number + bool(shots)) * 1000
    task.items = task.items[first : first + count]
    task.build_all_requests(limit=count)
    return list(task.instances)


def ask(lm: Any, requests: list[Any]) -> list[tuple[float, bool]]:
    return list(lm.loglikelihood(requests, disable_tqdm=True))


def work_of(lm: Any, requests: list[Any], tokens: int) -> float:
    """Floating-point operations of requests for which `tokens` tokens went through the model."""
    shapes = lm.llm.config.parameter_shapes()
    layers = sum(
        math.prod(shape) for name, shape in shapes.items() if ".layers." in name and len(shape) == 2
    )
    head = math.prod(shapes["model.decoder.embed_tokens.weight"])
    encode = lm.scorer.tokenizer.encode
    endings = sum(len(encode(request.args[1], add_bos=False)) for request in requests)
    return 2.0 * (layers * tokens + head * endings)


def product_rate(form: str) -> float:
    """Operations a second of the product that a 125M model's fc1 makes of 1,024 tokens."""
    import torch

    dtype = getattr(torch, form)
    inputs, weight = torch.randn(1024, 768, dtype=dtype), torch.randn(3072, 768, dtype=dtype)
    best = math.inf
    for _ in range(20):
        start = time.perf_counter()
        torch.nn.functional.linear(inputs, weight)
        best = min(best, time.perf_counter() - start)
    return 2.0 * inputs.numel() * len(weight) / best


def versions(*names: str) -> dict[str, str]:
    from importlib import metadata

    return {name: metadata.version(name) for name in names}


if __name__ == "__main__":
    sys.exit(main())

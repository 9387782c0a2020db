"""Fine-tune a model on your own text: all of it, or a small adapter.

FILE holds a JSON object a line, {"text": ...} or {"prompt": ..., "response": ...},
or the same as Parquet, or is a .txt file; all may be .gz or .zst. The same command
resumes a run that was stopped. DIR then goes wherever a model goes: --adapter DIR,
with --method full --model DIR.

Needs PyTorch and peft: pip install 'optlm[train]'.
"""

from __future__ import annotations

import dataclasses
import json
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from optlm.cli.common import (
    FAILURE,
    add_device_option,
    add_json_option,
    exit_code_of,
    say,
    usage_error,
)

USAGE = "--data FILE --out DIR [--model M] [--method lora] [options]"

# Flags, field, how to read it, what it does (its default, declared in FinetuneConfig).
_SETTINGS = (
    ("--max-steps", "max_steps", int, "optimizer steps (200)"),
    ("--learning-rate", "learning_rate", float, "highest (full 1e-5, lora 2e-4, prefix 2e-3, "
     "prompt 5e-3)"),
    ("--warmup-steps", "warmup_steps", int, "(a twentieth of the steps)"),
    ("--weight-decay", "weight_decay", float, "on matrices (0)"),
    ("--clip-norm", "clip_norm", float, "largest norm of the gradient (1)"),
    ("--batch-tokens", "batch_tokens", int, "tokens a step, padding included (2048)"),
    ("--micro-batch-tokens", "micro_batch_tokens", int, "of them at once in memory (2048)"),
    ("--seq-len", "seq_len", int, "tokens of a row (512, or the context)"),
    ("--on-long", "on_long", str, "pairs beyond that: error or truncate_prompt (error)"),
    ("--evaluate-every", "evaluate_every", int, "steps (a tenth of all)"),
    ("--patience", "patience", int, "evaluations without a better one until it stops (5)"),
    ("--precision", "precision", str, "of matrix products: f32 or bf16 (f32)"),
    ("--seed", "seed", int, "(0)"),
)  # fmt: skip
# The same for AdapterConfig, with the methods that have it.
_ADAPTER = (
    ("--rank", "rank", int, "of the change (8)", ("lora",)),
    ("--alpha", "alpha", float, "the change is multiplied by alpha / rank (16)", ("lora",)),
    ("--dropout", "dropout", float, "of what enters the change (0)", ("lora",)),
    ("--virtual-tokens", "virtual_tokens", int, "before the text (16)", ("prefix", "prompt")),
)


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("-m", "--model", help="folder or hub name (default: the bundled model)")
    parser.add_argument("--data", metavar="FILE", type=Path, required=True, help="examples")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder of the run")
    parser.add_argument("--method", help="full, lora, prefix or prompt (lora)")
    parser.add_argument(
        "--valid", metavar="FILE", type=Path, help="held-out examples (a twentieth of the data)"
    )
    parser.add_argument(
        "--neutral",
        metavar="FILE",
        type=Path,
        help="text on which forgetting is measured (the base writes some)",
    )
    add_device_option(parser)
    add_json_option(parser)
    training = parser.add_argument_group("training (defaults in parentheses)")
    for flag, name, kind, told in _SETTINGS:
        training.add_argument(flag, dest=name, type=kind, metavar=_METAVARS[kind], help=told)
    adapter = parser.add_argument_group("adapter (defaults in parentheses)")
    for flag, name, kind, told, methods in _ADAPTER:
        help_text = f"{'/'.join(methods)}: {told}"
        adapter.add_argument(flag, dest=name, type=kind, metavar=_METAVARS[kind], help=help_text)
    adapter.add_argument(
        "--target-modules",
        metavar="NAMES",
        help="lora: matrices to change, with commas, or all-linear (q_proj,v_proj)",
    )
    for flag, told in (("--dora", "magnitudes apart (DoRA)"), ("--rslora", "alpha / sqrt(rank)")):
        adapter.add_argument(flag, action="store_const", const=True, help=f"lora: {told}")


_METAVARS: dict[type, str] = {int: "N", float: "X", str: "CHOICE"}


def run(options: Namespace) -> int | None:
    adapter = _adapter_settings(options)
    try:
        from optlm.train.finetune.adapters import AdapterConfig
        from optlm.train.finetune.finetune import FinetuneConfig, finetune
    except ModuleNotFoundError as error:
        say(f"error: training needs {error.name}; install it with: pip install 'optlm[train]'")
        return FAILURE
    given = {name: getattr(options, name) for _, name, _, _ in _SETTINGS}
    settings: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
    method = options.method or FinetuneConfig.method
    if method != "full":
        settings["adapter"] = AdapterConfig(method=method, **adapter)
    config = FinetuneConfig(method=method, **settings)
    try:
        result = finetune(
            options.model,
            options.data,
            options.out,
            config,
            valid=options.valid,
            neutral=options.neutral,
            device=options.device,
            log=say,
        )
    except KeyboardInterrupt as interrupt:
        say(f"stopped; the same command resumes from {options.out}")
        return exit_code_of(interrupt)
    if options.json:
        print(json.dumps(dataclasses.asdict(result)))
    say(
        f"held-out loss {result.base_loss:.4f} -> {result.best_loss:.4f} nats a token at step "
        f"{result.best_step} of {result.step}, KL to the base {result.kl_to_base:.4f}; use it with "
        f"{'--model' if method == 'full' else '--adapter'} {options.out}"
    )
    return None


def _adapter_settings(options: Namespace) -> dict[str, Any]:
    """What was given of the adapter's options.

    Raises:
        RequestError: an option that the method does not have.
    """
    method = options.method or "lora"
    owners = {name: methods for _, name, _, _, methods in _ADAPTER}
    owners |= dict.fromkeys(("target_modules", "dora", "rslora"), ("lora",))
    given = {name: getattr(options, name) for name in owners}
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        if method not in owners[name]:
            flag = "--" + name.replace("_", "-")
            raise usage_error(f"{flag} is of --method {' or '.join(owners[name])}, not {method}")
    if "target_modules" in given:
        names = given["target_modules"].split(",")
        given["target_modules"] = tuple(name.strip() for name in names)
    return given

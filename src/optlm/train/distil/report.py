"""What a distillation brought: student, teacher, and the student's twin that had no teacher.

All figures are of the finished folders, on held-out text. Letters: N predictions, C of a chunk.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from optlm.checkpoint.save import atomic_file
from optlm.engine.llm import LLM
from optlm.engine.params import SamplingParams
from optlm.model import OPT
from optlm.train.distil.recipe import DistilConfig
from optlm.train.distil.teacher import open_teacher, teacher_tokenizer
from optlm.train.loop.device import training_device
from optlm.train.tokens.corpus import ReadReport, read_documents
from optlm.train.tokens.packed import encode_documents

__all__ = ["Closeness", "closeness", "write_report"]

Documents = dict[str, tuple[list[list[int]], int]]  # domain -> token ids, and bytes of their text

_CHUNK = 256  # rows of logits at a time
_SPEED_TOKENS = 64
_SPEED_ROUNDS = 3


@dataclass
class Closeness:
    """Of one domain: how well a model predicts it, and how far it is from the teacher."""

    predictions: int = 0
    nats: float = 0.0  # of all right tokens
    kl: float = 0.0  # KL(teacher, model), summed over predictions, nats
    agreed: int = 0  # predictions whose likeliest token is the teacher's


@dataclass
class _Row:
    name: str
    parameters: int
    weight_bytes: int
    tokens_per_s: float | None
    domains: dict[str, dict[str, float]] = field(default_factory=dict)

    def mean(self, figure: str) -> float:
        """Over the domains, each counted once."""
        return statistics.fmean(domain[figure] for domain in self.domains.values())

    def as_dict(self) -> dict[str, Any]:
        names = ("bits_per_byte", "kl", "agreement")
        return {
            "model": self.name,
            "parameters": self.parameters,
            "weight_bytes": self.weight_bytes,
            "tokens_per_s": self.tokens_per_s,
            **{name: self.mean(name) for name in names},
            "domains": self.domains,
        }


@torch.no_grad()
def closeness(model: OPT, teacher: OPT, documents: Sequence[Sequence[int]]) -> Closeness:
    """Compare two models of one vocabulary on documents, each beginning with ``</s>``.

    Longer ones are read in windows of the shorter context that share one token, so that every token
    but the first is predicted exactly once.
    """
    context = min(m.config.max_position_embeddings for m in (model, teacher))
    found = Closeness()
    for ids in documents:
        for begin in range(0, len(ids) - 1, context):
            chosen = ids[begin : begin + context + 1]
            window = torch.tensor([chosen], device=teacher.head_weight.device)
            mine, theirs = (m.hidden(window[:, :-1])[0] for m in (model, teacher))
            for at in range(0, len(mine), _CHUNK):
                rows = slice(at, at + _CHUNK)
                log_q = (mine[rows] @ model.head_weight.T).float().log_softmax(1)
                log_p = (theirs[rows] @ teacher.head_weight.T).float().log_softmax(1)
                wanted = window[0, 1:][rows, None]
                found.predictions += len(wanted)
                found.nats -= float(log_q.gather(1, wanted).sum())
                found.kl += float((log_p.exp() * (log_p - log_q)).sum())
                found.agreed += int((log_p.argmax(1) == log_q.argmax(1)).sum())
    return found


def write_report(
    config: DistilConfig,
    out: Path,
    models: Mapping[str, Path],
    *,
    speed: bool = True,
    device: str = "auto",
    log: Callable[[str], None] = lambda message: None,
) -> str:
    """Compare the models in `models` (name -> folder) with the teacher; return the table.

    ``report.md`` and ``report.json`` are written in `out`. The teacher is in memory meanwhile.
    `device` is that of the comparison; tokens a second are the engine's.

    Raises:
        ConfigError: no such device.
    """
    place = training_device(device)
    checkpoint = open_teacher(config.teacher)
    documents = _held_out(config, teacher_tokenizer(checkpoint))
    teacher = OPT.from_checkpoint(checkpoint.folder).to(place)
    rows = []
    for name, folder in {**models, "teacher": checkpoint.folder}.items():
        log(f"comparing {name} with the teacher")
        model = teacher if name == "teacher" else OPT.from_checkpoint(folder).to(place)
        row = _Row(
            name=name,
            parameters=model.config.parameter_count(),
            weight_bytes=model.config.weight_bytes("bf16"),
            tokens_per_s=_tokens_per_s(folder) if speed else None,
        )
        for domain, (ids, size) in documents.items():
            found = closeness(model, teacher, ids)
            row.domains[domain] = {
                "bits_per_byte": found.nats / math.log(2) / max(1, size),
                "kl": max(0.0, found.kl) / max(1, found.predictions),
                "agreement": found.agreed / max(1, found.predictions),
            }
        rows.append(row)
    values = {"text_bytes": config.training.validation_bytes, "rows": [r.as_dict() for r in rows]}
    table = _table(rows)
    for file, text in (("report.json", json.dumps(values, indent=1)), ("report.md", _page(table))):
        with atomic_file(out / file) as target:
            target.write((text + "\n").encode())
    return table


def _held_out(config: DistilConfig, tokenizer: Any) -> Documents:
    documents = {}
    for domain, file in config.training.data.validation.items():
        report = ReadReport()
        texts = read_documents(Path(file), report, max_bytes=config.training.validation_bytes)
        documents[domain] = (list(encode_documents(tokenizer, texts)), report.text_bytes)
    return documents


def _tokens_per_s(folder: Path) -> float:
    """Greedy decoding of one sequence by the engine, as it would be used; median of three."""
    llm = LLM(folder)
    count = min(_SPEED_TOKENS, llm.config.max_position_embeddings - 2)
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    prompt = [llm.config.bos_token_id]
    llm.generate([prompt], params)
    times = []
    for _ in range(_SPEED_ROUNDS):
        start = time.perf_counter()
        llm.generate([prompt], params)
        times.append(time.perf_counter() - start)
    return count / statistics.median(times)


def _table(rows: Sequence[_Row]) -> str:
    domains = list(rows[0].domains)
    titles = ["model", "parameters", "bytes (bf16)", "tokens/s", "KL to teacher", "top-1 agreement"]
    titles += ["bits/byte", *domains]
    lines = ["| " + " | ".join(titles) + " |", "|---|" + "---:|" * (len(titles) - 1)]
    for row in rows:
        speed = "-" if row.tokens_per_s is None else f"{row.tokens_per_s:,.0f}"
        cells = [row.name, f"{row.parameters:,}", f"{row.weight_bytes:,}", speed]
        cells += [f"{row.mean('kl'):.4f}", f"{row.mean('agreement'):.1%}"]
        cells += [f"{row.mean('bits_per_byte'):.4f}"]
        cells += [f"{row.domains[name]['bits_per_byte']:.4f}" for name in domains]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _page(table: str) -> str:
    return f"""# Distillation

{table}

On held-out text. KL(teacher, model) in nats a prediction; agreement: the share of predictions whose
likeliest token is the teacher's. KL, agreement and bits/byte are means over the domains; columns of
domains are bits per byte. tokens/s: one sequence, greedy, by the engine on this machine."""

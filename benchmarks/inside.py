"""What is inside a model: what its heads do, how they came about, how sparse its units are.

python benchmarks/inside.py --corpus CORPUS [--models FOLDER ...] [--runs RUN ...]

CORPUS holds DOMAIN.valid.jsonl.zst. FOLDER is a model whose heads are matched with ours. RUN is a
folder of `optlm pretrain` with checkpoints kept (`loop.keep_every`). docs/findings.md tells what
came of it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import common
import report
from optlm.config import OPTConfig
from optlm.interpret import (
    HeadReport,
    Site,
    Subject,
    ablate,
    align_heads,
    head_report,
    open_subject,
    repeated_tokens,
    sparsity_profile,
)
from optlm.interpret.patching import sites_of
from optlm.model import OPT
from optlm.train.run.folder import RunFolder
from optlm.train.tokens.corpus import ReadReport, read_documents

LENGTH, PIECES = 512, 4  # tokens of a piece, pieces of each domain for the heads
PROBES = (0, 1, 2)  # seeds of the repeated random tokens
METHOD = (
    f"{PIECES} held-out pieces of {LENGTH} tokens of each domain for previous, start, itself and "
    f"spread; {len(PROBES)} blocks of 256 random tokens, each repeated once, for duplicate and "
    "induction. 'Copying' is the loss on the first copy less that on the second, in nats a token; "
    "'lost without' is what of it goes when the head is set to zero. float32, {threads} threads."
)


def main() -> None:
    parser = common.options(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--runs", type=Path, nargs="*", default=[])
    parser.add_argument("--models", nargs="*", default=[], help="folders to align with ours")
    wanted = common.parse(parser)
    torch.set_num_threads(wanted.threads)
    subject = open_subject(wanted.bundled)
    domains = {
        file.name.split(".")[0]: pieces(subject, file, 16)
        for file in sorted(wanted.corpus.glob("*.valid.jsonl.zst"))
    }
    texts = [piece for found in domains.values() for piece in found[:PIECES]]
    ours = head_report(subject.model, texts, name="mini-8m", seeds=PROBES)
    publish_heads(wanted, subject.model, ours)
    publish_units(wanted, subject.model, domains)
    if wanted.models:
        publish_alignment(wanted, ours, texts)
    if wanted.runs:
        publish_training(wanted, texts)


def pieces(subject: Subject, file: Path, count: int) -> list[list[int]]:
    """`count` pieces of LENGTH tokens, evenly over the file; each begins with the start token."""
    documents = read_documents(file, ReadReport(), max_bytes=2_000_000)
    ids: list[int] = []
    for text in documents:
        ids += subject.tokenizer.encode(text, add_bos=False)
    step = (len(ids) - LENGTH) // count
    start = subject.model.config.bos_token_id
    return [[start, *ids[i * step : i * step + LENGTH - 1]] for i in range(count)]


def copying(model: OPT, without: Sequence[Site] = ()) -> float:
    """How much better a second copy of random tokens is predicted than the first, in nats."""
    gains = []
    for seed in PROBES:
        ids = repeated_tokens(model.config, seed=seed)
        logits = torch.from_numpy(ablate(model, ids, without))
        loss = -logits[:-1].log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
        half = len(ids) // 2
        gains.append(float(loss[1:half].mean() - loss[half + 1 :].mean()))
    return float(np.mean(gains))


def publish_heads(wanted: argparse.Namespace, model: OPT, found: HeadReport) -> None:
    whole = copying(model)
    sites = sites_of(model, "heads")
    rows = [
        {"head": f"{head.layer}.{head.head}", "role": head.role}
        | {key: float(score[head.layer, head.head]) for key, score in found.scores.items()}
        | {"lost": whole - copying(model, [sites[head.layer][head.head]])}
        for head in found.roles
    ]
    names = ["previous", "start", "itself", "duplicate", "induction", "spread"]
    report.Report(
        name="inside-heads",
        title="Heads of the bundled model",
        method=METHOD.format(threads=wanted.threads),
        rows=rows,
        columns={"head": "layer.head", "role": "role"}
        | {name: name for name in names}
        | {"lost": "lost without"},
        headline={
            "induction heads": [row["head"] for row in rows if row["role"] == "induction"],
            "copying, nats a token": whole,
            "copying without the induction heads": copying(
                model, [sites[h.layer][h.head] for h in found.with_role("induction")]
            ),
            **{
                f"heads with the role {role}": len(found.with_role(role))
                for role in ("induction", "duplicate", "previous", "start", "itself", "broad")
            },
        },
        packages={},
    ).publish(wanted, lambda path: draw_heads(path, found))


def publish_units(
    wanted: argparse.Namespace, model: OPT, domains: dict[str, list[list[int]]]
) -> None:
    profiles = {name: sparsity_profile(model, found) for name, found in domains.items()}
    whole = sparsity_profile(model, [piece for found in domains.values() for piece in found])
    rows = [
        {"layer": str(i), "all": float(whole.active_share[i])}
        | {name: float(profile.active_share[i]) for name, profile in profiles.items()}
        | {
            "least": float(whole.least_share[i]),
            "most": float(whole.most_share[i]),
            "never": int(whole.never[i]),
            "rare": int((whole.unit_share[i] < 0.01).sum()),
        }
        for i in range(len(whole.active_share))
    ]
    report.Report(
        name="inside-units",
        title="Active feed-forward units of the bundled model",
        method=(
            f"Share of the inputs of fc2 that are not zero, over {whole.tokens:,} held-out tokens; "
            "by domain, and on the tokens with the fewest and the most. 'Never' and 'rare' count "
            "units active on no token, or on less than one in a hundred."
        ),
        rows=rows,
        columns={key: key for key in rows[0]},
        headline={"active inputs of fc2": whole.mean_share}
        | {f"active on {name}": profile.mean_share for name, profile in profiles.items()},
        packages={},
    ).publish(wanted)


def publish_alignment(
    wanted: argparse.Namespace, ours: HeadReport, texts: Sequence[Sequence[int]]
) -> None:
    rows: list[dict[str, Any]] = []
    shares = {}
    for folder in map(Path, wanted.models):
        theirs = head_report(open_subject(folder).model, texts, name=folder.name, seeds=PROBES)
        found = align_heads(ours, theirs)
        shares[f"pairs of {folder.name} with one role"] = (
            f"{sum(pair.same_role for pair in found.pairs)} of {len(found.pairs)}"
        )
        for pair in found.pairs:
            row = {"model": folder.name, "distance": pair.distance}
            for side, head, scored in (("our", pair.ours, ours), ("their", pair.theirs, theirs)):
                place = head.layer, head.head
                row[f"{side}_head"] = f"{head.layer}.{head.head}"
                row[f"{side}_role"] = head.role
                for key in ("previous", "induction", "spread"):
                    row[f"{side}_{key}"] = float(scored.scores[key][place])
            rows.append(row)
    report.Report(
        name="inside-alignment",
        title="Heads of the bundled model and their counterparts in others",
        method=METHOD.format(threads=wanted.threads)
        + " Pairs are the one-to-one matching with the least total distance over all scores and "
        "the relative depth (Hungarian method), nearest first.",
        rows=rows,
        columns={"model": "model"}
        | {
            f"{side}_{key}": f"{side} {key}"
            for side in ("our", "their")
            for key in ("head", "role", "previous", "induction", "spread")
        }
        | {"distance": "distance"},
        headline=shares,
        packages={},
    ).publish(wanted)


def publish_training(wanted: argparse.Namespace, texts: Sequence[Sequence[int]]) -> None:
    rows = []
    for run in wanted.runs:
        settings = json.loads((run / "run.json").read_text(encoding="utf-8"))
        folder = RunFolder(run)
        for step in folder.steps():
            rows.append(checkpoint_row(run.name, settings, step, folder, texts))
            print(json.dumps(rows[-1]))
    report.Report(
        name="inside-training",
        title="Heads over training",
        method=METHOD.format(threads=wanted.threads)
        + " Each row is a kept checkpoint, the weights as trained; scores are the best head's.",
        rows=rows,
        columns={
            "run": "run", "step": "step", "tokens": "tokens", "copying": "copying",
            "previous": "previous", "induction": "induction", "head": "its head",
            "inductive": "induction heads", "previous_heads": "previous-token heads",
            "active": "active inputs of fc2",
        },
        headline={},
        packages={},
    ).publish(wanted, lambda path: draw_training(path, rows))  # fmt: skip


def checkpoint_row(
    name: str,
    settings: dict[str, Any],
    step: int,
    folder: RunFolder,
    texts: Sequence[Sequence[int]],
) -> dict[str, Any]:
    model = OPT(OPTConfig.from_dict(settings["model"])).eval()
    model.load_state_dict(folder.load(step)["model"])
    found = head_report(model, texts, seeds=PROBES)
    induction = found.scores["induction"]
    layer, head = np.unravel_index(induction.argmax(), induction.shape)
    return {
        "run": name,
        "step": step,
        "tokens": step * settings["batch_tokens"],
        "copying": copying(model),
        "previous": float(found.scores["previous"].max()),
        "induction": float(induction.max()),
        "head": f"{layer}.{head}",
        "inductive": len(found.with_role("induction")),
        "previous_heads": len(found.with_role("previous")),
        "active": sparsity_profile(model, texts).mean_share,
    }


# ---- pictures ------------------------------------------------------------------------------------


def draw_heads(path: Path, found: HeadReport) -> None:
    """One field a head, layers downwards, for the scores that tell heads apart."""
    pyplot = drawing()
    names = ("previous", "induction", "duplicate", "start", "itself", "spread")
    figure, axes = pyplot.subplots(1, len(names), figsize=(10, 3.6), layout="constrained")
    for axis, name in zip(axes, names, strict=True):
        score = found.scores[name]
        axis.imshow(score, cmap="Blues", vmin=0, vmax=1)
        for (layer, head), value in np.ndenumerate(score):
            shade = "white" if value > 0.6 else "black"
            axis.text(head, layer, f"{value:.2f}", ha="center", va="center", size=7, color=shade)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("head", fontsize=8)
        axis.set_xticks(range(score.shape[1]))
        axis.set_yticks(range(score.shape[0]))
        axis.tick_params(length=0, labelsize=8)
    axes[0].set_ylabel("layer", fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def draw_training(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """What grows over the tokens that were read, one line a run."""
    pyplot = drawing()
    panels = {
        "previous": "previous-token score, best head",
        "induction": "induction score, best head",
        "copying": "copying, nats a token",
        "active": "active inputs of fc2",
    }
    figure, axes = pyplot.subplots(2, 2, figsize=(9, 6), layout="constrained", sharex=True)
    for axis, (key, title) in zip(axes.flat, panels.items(), strict=True):
        for run in dict.fromkeys(row["run"] for row in rows):
            own = [row for row in rows if row["run"] == run]
            tokens = [row["tokens"] / 1e6 for row in own]
            axis.plot(tokens, [row[key] for row in own], marker=".", label=run)
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_ylim(bottom=min(0, *axis.get_ylim()))
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    for axis in axes[1]:
        axis.set_xlabel("million tokens read", fontsize=9)
    axes[0, 0].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def drawing() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


if __name__ == "__main__":
    main()

"""Bits per byte of held-out text: the bundled model beside gzip and a 5-gram model of bytes.

    python benchmarks/bits_per_byte.py --corpus CORPUS [--model FOLDER]

CORPUS holds DOMAIN.jsonl.zst (training text) and DOMAIN.valid.jsonl.zst. For every domain all three
read the same held-out documents. The model runs in float32 through the reference forward pass,
each document on its own after `</s>`, in windows of the context. gzip packs all documents of the
domain as one file (level 9). The 5-gram model predicts a byte from the four before it, with
Witten-Bell interpolation down to single bytes (Witten and Bell 1991, method C). It is trained on
the beginning of the domain's own training text: it knows the domain, the model has to notice it.
A table goes to standard output, then one JSON line.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from optlm.model import OPT
from optlm.train.pretrain.validate import bits_per_byte
from optlm.train.tokens.corpus import ReadReport, read_documents
from optlm.train.tokens.packed import encode_documents

ORDER = 5
BETWEEN = (
    b"\0"  # stands between documents for the 5-gram model; it occurs in no text and is not scored
)
BUNDLED = Path(__file__).resolve().parents[1] / "src/optlm/assets/mini-8m"

Codes = NDArray[np.uint64]


def main() -> int:
    options = arguments()
    model = OPT.from_checkpoint(options.model)
    tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
    rows = []
    for file in sorted(options.corpus.glob("*.valid.jsonl.zst")):
        domain = file.name.removesuffix(".valid.jsonl.zst")
        texts = read(file, options.bytes)
        training = read(options.corpus / f"{domain}.jsonl.zst", options.train_bytes)
        size = sum(len(text.encode()) for text in texts)
        rows.append(
            {
                "domain": domain,
                "bytes": size,
                "model": bits_per_byte(model, list(encode_documents(tokenizer, texts)), size),
                "gzip": gzip_bits(texts) / size,
                "5-gram": ngram_bits(training, texts) / size,
            }
        )
        print(f"{domain} done", file=sys.stderr)
    print(table(rows))
    print(
        json.dumps({"benchmark": "bits_per_byte", "train_bytes": options.train_bytes, "rows": rows})
    )
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--corpus", type=Path, required=True, help="folder of the corpus files")
    parser.add_argument("--model", type=Path, default=BUNDLED, help="checkpoint folder")
    parser.add_argument(
        "--bytes", type=int, default=300_000, help="held-out text of each domain (default: 300000)"
    )
    parser.add_argument(
        "--train-bytes", type=int, default=5_000_000, help="text for the 5-gram (default: 5000000)"
    )
    return parser.parse_args()


def read(file: Path, limit: int) -> list[str]:
    return list(read_documents(file, ReadReport(), max_bytes=limit))


def table(rows: list[dict[str, object]]) -> str:
    lines = ["| domain | held-out bytes | model | 5-gram | gzip -9 |", "|---|---:|---:|---:|---:|"]
    for row in rows:
        figures = " | ".join(f"{row[name]:.3f}" for name in ("model", "5-gram", "gzip"))
        lines.append(f"| {row['domain']} | {row['bytes']:,} | {figures} |")
    return "\n".join(lines)


def gzip_bits(texts: list[str]) -> int:
    return 8 * len(gzip.compress("\n".join(texts).encode(), 9))


# ---- the 5-gram model --------------------------------------------------------------------------


def ngram_bits(training: list[str], texts: list[str]) -> float:
    """Bits of all bytes of `texts`, those of the separators left out."""
    train, held_out = joined(training), joined(texts)
    scored = held_out[ORDER - 1 :] != 0
    probability = np.full(int(scored.sum()), 1 / 256)
    for order in range(1, ORDER + 1):
        seen, counts = np.unique(grams(train, order), return_counts=True)
        contexts, first = np.unique(seen >> np.uint64(8), return_index=True)
        totals = np.add.reduceat(counts, first)
        kinds = np.diff(first, append=len(seen))  # different bytes seen after each context
        wanted = grams(held_out, order)[scored]
        hits = look_up(seen, counts, wanted)
        context_total = look_up(contexts, totals, wanted >> np.uint64(8))
        context_kinds = look_up(contexts, kinds, wanted >> np.uint64(8))
        known = context_total > 0
        mixed = (hits + context_kinds * probability) / np.maximum(context_total + context_kinds, 1)
        probability = np.where(known, mixed, probability)
    return float(-np.log2(probability).sum())


def joined(texts: list[str]) -> NDArray[np.uint8]:
    """All texts with separators around each, and enough of them in front for a whole context."""
    data = BETWEEN * (ORDER - 1) + BETWEEN.join(text.encode() for text in texts) + BETWEEN
    return np.frombuffer(data, dtype=np.uint8)


def grams(data: NDArray[np.uint8], order: int) -> Codes:
    """The last `order` bytes up to every position from ORDER - 1 on, as one number each."""
    codes = np.zeros(len(data) - ORDER + 1, dtype=np.uint64)
    for back in reversed(range(order)):
        begin = ORDER - 1 - back
        codes = (codes << np.uint64(8)) | data[begin : begin + len(codes)].astype(np.uint64)
    return codes


def look_up(keys: Codes, values: NDArray[np.int64], wanted: Codes) -> NDArray[np.int64]:
    """`values` of the `wanted` keys; 0 for those that are not there."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)


if __name__ == "__main__":
    sys.exit(main())

"""What a smaller format costs: bits per byte of held-out text in every format of the engine.

    python benchmarks/precision.py --corpus CORPUS [--model FOLDER]

CORPUS holds DOMAIN.valid.jsonl.zst files. Every document is scored by `LLM.score`, in windows where
it is longer than the context; all formats read the same text.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from bits_per_byte import BUNDLED, read
from optlm import LLM
from report import Report

# Title: format of the weights, of keys and values.
FORMATS = {
    "f32": ("f32", "f32"),
    "bf16": ("bf16", "f16"),
    "int8": ("int8", "f16"),
    "int8, int8 keys and values": ("int8", "int8"),
}
COSTS = {f"{title} over f32, %": title for title in FORMATS if title.startswith("int8")}


@dataclasses.dataclass
class Totals:
    bits: float = 0.0
    size: int = 0

    @property
    def bits_per_byte(self) -> float:
        return self.bits / self.size


def main() -> None:
    options = arguments()
    texts = {
        file.name.removesuffix(".valid.jsonl.zst"): read(file, options.bytes)
        for file in sorted(options.corpus.glob("*.valid.jsonl.zst"))
    }
    found = {title: measure(options.model, *of, texts) for title, of in FORMATS.items()}
    rows = [row(domain, found) for domain in [*texts, "all"]]
    report = Report(
        name="precision",
        title="Bits per byte of held-out text, by format of the weights",
        method=f"Up to {options.bytes:,} bytes of each domain, scored by LLM.score on the native "
        "backend.",
        rows=rows,
        columns={
            "domain": "domain",
            "bytes": "bytes",
            **{title: title for title in (*FORMATS, *COSTS)},
        },
        headline={f"{cost}, all domains": rows[-1][cost] for cost in COSTS},
        packages={},
    )
    report.publish(options)


def measure(
    model: Path, dtype: str, kv_dtype: str, texts: dict[str, list[str]]
) -> dict[str, Totals]:
    llm = LLM(model, dtype=dtype, kv_dtype=kv_dtype)  # type: ignore[arg-type]
    totals = {domain: Totals() for domain in [*texts, "all"]}
    for domain, documents in texts.items():
        for scored in llm.score(documents, on_overflow="windows"):
            size = len((scored.text or "").encode())
            for total in (totals[domain], totals["all"]):
                total.bits += scored.bits_per_byte * size
                total.size += size
    return totals


def row(domain: str, found: dict[str, dict[str, Totals]]) -> dict[str, float | int | str]:
    exact = found["f32"][domain]
    bits = {title: totals[domain].bits_per_byte for title, totals in found.items()}
    costs = {cost: 100 * (bits[title] / bits["f32"] - 1) for cost, title in COSTS.items()}
    return {"domain": domain, "bytes": exact.size, **bits, **costs}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--corpus", type=Path, required=True, help="folder of the corpus files")
    parser.add_argument("--model", type=Path, default=BUNDLED, help="checkpoint folder")
    parser.add_argument("--bytes", type=int, default=100_000, help="text of each domain")
    parser.add_argument("--json", metavar="FILE", help="write the JSON line there too")
    parser.add_argument("--name", help="of the result files")
    parser.add_argument("--results", default=Path(__file__).parent / "results", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()

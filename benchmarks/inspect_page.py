"""The page of `optlm inspect --html` on a long text: its size, how fast it opens, how it moves.

    python benchmarks/inspect_page.py [--model 125m] [--tokens 2048] [--chromium /usr/bin/chromium]

The page of random tokens is made and opened in a headless Chromium, each time with a new profile.
It is open when the first head is drawn. Then every part is used by mouse and keyboard; a frame is
the time between two calls of requestAnimationFrame, the longest counts.
"""

from __future__ import annotations

import argparse
import statistics
import time
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from playwright.sync_api import Page, expect, sync_playwright

import checkpoints
import common
import report
from optlm.interpret import open_subject
from optlm.interpret.page import inspect_page

WATCH = """() => {
  window.frames_ = [];
  let last = performance.now();
  const next = (now) => {
    window.frames_.push(now - last);
    last = now;
    requestAnimationFrame(next);
  };
  requestAnimationFrame(next);
}"""


def main() -> None:
    parser = common.options(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", default="125m")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    wanted = common.parse(parser)
    torch.set_num_threads(wanted.threads)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "page.html"
        begun = time.perf_counter()
        write(wanted, file)
        making = time.perf_counter() - begun
        size = file.stat().st_size
        opened, longest = browse(wanted, file)
    rows = [
        {"round": number, "open_s": seconds, "longest_ms": frame}
        for number, (seconds, frame) in enumerate(zip(opened, longest, strict=True), start=1)
    ]
    report.Report(
        name="inspect-page",
        title="The page that shows the inside of a model",
        method=(
            f"{wanted.model}, {wanted.tokens} tokens, {wanted.rounds} times in a new Chromium "
            "without a GPU."
        ),
        rows=rows,
        columns={"round": "round", "open_s": "open, s", "longest_ms": "longest frame, ms"},
        headline={
            "megabytes": size / 1e6,
            "seconds to make": making,
            "seconds to open": statistics.median(opened),
            "longest frame, ms, median and most": (
                f"{statistics.median(longest):.0f}, {max(longest):.0f}"
            ),
        },
        packages={"playwright": metadata.version("playwright"), "torch": torch.__version__},
    ).publish(wanted)


def write(wanted: argparse.Namespace, file: Path) -> None:
    subject = open_subject(checkpoints.checkpoint(wanted.model))
    size = common.vocabulary(wanted.model)
    ids = np.random.default_rng(0).integers(4, size, 2 * wanted.tokens).tolist()
    text = subject.tokenizer.decode(ids)
    while len(subject.tokenizer.encode(text, add_bos=True)) > wanted.tokens:
        over = len(subject.tokenizer.encode(text, add_bos=True)) - wanted.tokens
        text = text[: -max(1, over)]
    inspect_page(subject, text).write(file)


def browse(wanted: argparse.Namespace, file: Path) -> tuple[list[float], list[float]]:
    opened, longest = [], []
    with sync_playwright() as driver:
        for _ in range(wanted.rounds):
            browser = driver.chromium.launch(executable_path=wanted.chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1300, "height": 900})
            begun = time.perf_counter()
            page.goto(file.as_uri())
            expect(page.locator("#head-title")).to_have_text("Layer 0, head 0", timeout=60_000)
            opened.append(time.perf_counter() - begun)
            longest.append(longest_frame(page))
            browser.close()
    return opened, longest


def longest_frame(page: Page) -> float:
    page.wait_for_timeout(300)
    page.evaluate(WATCH)
    for token in (3, 40, 7, 90, 11):
        page.hover(f"#attention-text [data-token='{token}']")
        page.wait_for_timeout(40)
    keys(page, "#model-view", "ArrowRight ArrowDown ArrowRight ArrowDown ArrowLeft")
    for control in ("input[value=to]", "#average", "#skip-first", "#average", "#zoom-in"):
        page.click(control)
        page.wait_for_timeout(60)
    keys(page, "#attention-text", "ArrowRight ArrowRight ArrowDown")
    for tab in ("lens", "probabilities", "sparsity", "attention"):
        page.click(f"#tab-{tab}")
        page.wait_for_timeout(80)
    page.click("#tab-lens")
    keys(page, "#lens-at", "ArrowRight PageUp PageUp ArrowLeft")
    page.wait_for_timeout(100)
    frames: list[Any] = page.evaluate("window.frames_")
    return float(max(frames))


def keys(page: Page, where: str, pressed: str) -> None:
    for key in pressed.split():
        page.press(where, key)
        page.wait_for_timeout(60)


if __name__ == "__main__":
    main()

"""The convention minicons against minicons itself, where its environment is (OPTLM_PEERS)."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from score_bench import Bench

from optlm.score import Scorer, word_scores

TEXTS = ["the cat sat on the mat", "Once upon a time there was a little cat", "the rain again"]
PAIRS = [("the cat", "sat on the mat"), ("then the other cats", "went home")]
WORKER = Path(__file__).with_name("minicons_worker.py")
NATS = 1e-4


@pytest.fixture
def said(bench: Bench, tmp_path: Path) -> Any:
    python = Path(os.environ.get("OPTLM_PEERS", "")) / "minicons" / "bin" / "python"
    if not python.is_file():
        pytest.skip("no minicons under OPTLM_PEERS")
    bench.peer.save_pretrained(tmp_path)
    bench.peer_tokenizer.save_pretrained(tmp_path)
    command = [str(python), str(WORKER), str(tmp_path), json.dumps(TEXTS), json.dumps(PAIRS)]
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=quiet)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_tokens_sentences_words_and_continuations(bench: Bench, said: Any) -> None:
    scorer = Scorer(bench.llm, convention="minicons")
    for place, result in enumerate(scorer.tokens(TEXTS)):
        wanted = [score for _, score in said["tokens"][place]]
        assert result.scored == pytest.approx(wanted[1:], abs=NATS)
        assert result.total == pytest.approx(said["sums"][place], abs=NATS * result.num_scored)
        assert result.mean == pytest.approx(said["means"][place], abs=NATS)
    for result, total in zip(scorer.conditional(PAIRS), said["conditional"], strict=True):
        assert result.total == pytest.approx(total, abs=NATS * len(result.logprobs))
    corrected = Scorer(bench.llm, convention="minicons", corrects_words=True)
    for place, result in enumerate(corrected.tokens(TEXTS, words=True)):
        wanted = [score for _, score in said["corrected"][place]]
        words = word_scores(result)
        for word in words:
            places = [
                i for i, t in enumerate(result.tokens) if word.start <= t.start < t.end <= word.end
            ]
            total = sum(wanted[i] for i in places)
            assert word.logprob == pytest.approx(total, abs=NATS * len(places))
        assert [word.text.strip() for word in words] == TEXTS[place].split()

"""What minicons says: run by its own Python. Arguments: a folder, JSON of texts and of pairs."""

from __future__ import annotations

import json
import sys


def main(folder: str, texts: list[str], pairs: list[tuple[str, str]]) -> None:
    from minicons.scorer import IncrementalLMScorer

    scorer = IncrementalLMScorer(folder, "cpu")
    prefixes, stimuli = ([pair[side] for pair in pairs] for side in (0, 1))
    result = {
        "tokens": scorer.token_score(texts),
        "corrected": scorer.token_score(texts, bow_correction=True),
        "sums": scorer.sequence_score(texts, reduction=lambda values: values.sum().item()),
        "means": scorer.sequence_score(texts),
        "conditional": scorer.conditional_score(
            prefixes, stimuli, reduction=lambda values: values.sum().item()
        ),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3]))

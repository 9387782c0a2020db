"""A set of one's own through lm-evaluation-harness, without shots and with one."""

import json
import sys
import tempfile
from pathlib import Path

from optlm import LLM
from optlm.evaluate.run import evaluate
from optlm.evaluate.table import table

llm = LLM(sys.argv[1] if len(sys.argv) > 1 else None)
pairs = [
    ("The dog wagged", "its tail.", "its sky."),
    ("She ate", "an apple.", "a house."),
    ("He was sad, so he", "cried.", "flew."),
]
items = [{"question": start, "choices": [right, wrong], "gold": 0} for start, right, wrong in pairs]
folder = Path(tempfile.mkdtemp())  # a folder of sets, in the form of docs/evaluation.md
(folder / "piqa.jsonl").write_text("\n".join(map(json.dumps, items)), encoding="utf-8")

for shots in (0, 1):
    found = evaluate(llm, ["piqa"], data=folder, num_fewshot=shots, cut=True)
    print(table(found.results))
    print(f"{found.forward_tokens} tokens went through the model\n")

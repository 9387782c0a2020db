"""Choose labels by their likelihood after a prompt, and see how far the prompt can be believed."""

import sys

from optlm import LLM, classify
from optlm.evaluate.labels import Example, Template
from optlm.evaluate.prompt_report import prompt_report

llm = LLM(sys.argv[1] if len(sys.argv) > 1 else None)
labels = ["happy", "sad"]
template = Template(prompt="{text} They felt very")
shots = [
    Example(text="The dog died.", label="sad"),
    Example(text="It is a big party.", label="happy"),
    Example(text="She lost her doll.", label="sad"),
    Example(text="He won.", label="happy"),
]
items = [
    Example(text="They went to the park.", label="happy"),
    Example(text="The toy broke.", label="sad"),
]

for method in ("plain", "calibrated", "pmi"):
    texts = [item.text for item in items]
    found = classify(texts, labels, llm=llm, templates=template, method=method)
    for answer in found:
        print(
            f"{method:10} {answer.label:6} {answer.probabilities[answer.label]:.3f} {answer.text}"
        )

# Which shots, and in which order? On two items it only shows the form of the report.
print(prompt_report(llm, labels, items, pool=shots, num_shots=1, templates=template, orders=2))

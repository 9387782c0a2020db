"""How sure is the model of each token, and do its own answers agree?"""

import sys

from optlm import LLM
from optlm.uncertainty.asking import ask
from optlm.uncertainty.measures import measure

llm = LLM(sys.argv[1] if len(sys.argv) > 1 else None)

(figures,) = measure(llm, ["The dog went to the moon."])
for token, logprob, entropy in zip(
    figures.token_ids.tolist(), figures.logprob, figures.entropy, strict=True
):
    print(f"{logprob:9.3f} nats, entropy {entropy:.3f}  {llm.tokenizer.token_text(token)!r}")

(answered,) = ask(llm, ["The cat sat"], samples=4, max_tokens=4, stop=".")
print(answered.text, answered.samples.texts, answered.meanings.groups)
for name, value in answered.figures.items():
    print(f"{value:9.3f}  {name}")

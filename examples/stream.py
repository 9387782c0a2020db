"""Print a text while it is being generated."""

import sys

from optlm import LLM, SamplingParams

llm = LLM(sys.argv[1] if len(sys.argv) > 1 else None)
prompt = "The little dog"

print(prompt, end="", flush=True)
for piece in llm.stream(prompt, SamplingParams(temperature=0.6, top_p=0.9, max_tokens=60, seed=1)):
    print(piece.text, end="", flush=True)
print()

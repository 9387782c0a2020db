"""Many prompts of different lengths run together; each gets the text it would get alone."""

import sys

from optlm import LLM, SamplingParams

llm = LLM(sys.argv[1] if len(sys.argv) > 1 else None)
prompts = [
    "Once upon a time there was a",
    "Tom looked at the sky and",
    "In the small house by the river lived an old woman who",
]
params = SamplingParams(temperature=0, max_tokens=30, stop="\n")

together = llm.generate(prompts, params)
for output in together:
    alone = llm.generate(output.prompt, params)[0]
    print(f"{output.prompt}{output.text}")
    print(f"  the same alone: {alone.token_ids == output.token_ids}")

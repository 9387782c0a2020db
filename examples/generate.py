"""Continue a text with the bundled model; pass a folder or hub name to use another."""

import sys

from optlm import LLM, SamplingParams

llm = LLM(sys.argv[1] if len(sys.argv) > 1 else None)
params = SamplingParams(temperature=0.6, top_p=0.9, max_tokens=60, seed=7)
output = llm.generate("Once upon a time", params)[0]

print(output.prompt + output.text)
print(f"[{len(output.token_ids)} tokens, finish_reason={output.finish_reason}]", file=sys.stderr)

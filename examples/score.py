"""Which of two sentences does the model find likelier, and where do they part?"""

import sys

from optlm import LLM

llm = LLM(sys.argv[1] if len(sys.argv) > 1 else None)
pair = ["The dogs run in the park.", "The dogs runs in the park."]

for text, scored in zip(pair, llm.score(pair), strict=True):
    print(f"{scored.total:9.3f} nats  {scored.bits_per_byte:.3f} bits per byte  {text}")
    for token, logprob in zip(scored.token_ids[1:], scored.logprobs[1:], strict=True):
        print(f"{logprob:12.3f}  {llm.tokenizer.token_text(token)!r}")

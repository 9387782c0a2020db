"""An OpenAI-compatible server on `AsyncLLM`.

    errors                     what is refused, in OpenAI's shape
    jsonbody, fields, requests strict JSON -> strict types: unknown fields and wrong values refused
    served                     what is served: names, vocabulary, limits of one model
    plan                       a validated request -> prompts and parameters of the engine
    completions, logprobs      the engine's outputs -> OpenAI's responses, whole or in pieces
    app, http                  routes, and reading and writing of HTTP around them
    server                     one process: engine, sockets, signals

Everything up to `completions` knows nothing of HTTP; the batch runner stands on it too.
"""

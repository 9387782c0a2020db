"""Few-shot evaluation, classification by prompts, and reports about languages.

`run` evaluates tasks through lm-evaluation-harness on our engine (`harness` is the model class that
the harness sees, `protocol` the task class, `tasks` the table of tasks).
"""

"""Triton kernels of the fused operations, installed as ``pyunictokens.kernels``; ``docs/ops.md`` lists the backends.

One kernel family a file: `grpo` (the loss over log-probs), `rows` (which tokens take part), `epilogue` (a row of
logits), `head` (matrix tiles), `rotary` (queries and keys). `engine` strings those of a head together, `plan` chooses
how and knows neither torch nor Triton. Importing this package imports none of them.
"""

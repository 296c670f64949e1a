"""Triton kernels of the fused operations, installed as ``pyunictokens.kernels``; ``docs/ops.md`` lists the backends."""

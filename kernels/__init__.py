"""Triton kernels of the fused operations, installed as ``pyunictokens.kernels``; see ``docs/ops.md`` for the backends."""

"""The published way of doing it, in plain PyTorch, for benchmarks to be held against and tests to be checked with."""

"""The operations beside their peers: cases, peers, clock and one schema of results. `python -m benchmarks.ops` runs it.

Legend of shape suffixes in this folder: R rollouts, T timesteps, N positions, L = T·N tokens of a rollout, M = R·L,
D width, K codes, B samples. How numbers are taken is told in docs/benchmarks.md.
"""

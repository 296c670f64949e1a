"""The rivals of the paper's tables, trained: one file a method, which says how it learns a concept and how a table asks
what it learned.

    base.py          what all methods have: Job, Plan, Method, Trained (baseline.json)
    registry.py      the methods by name
    loop.py          optimizer steps with checkpoints, whatever is learned
    NAME.py          a method

`pyunictokens baseline train NAME ROOT CONCEPT --out DIR` trains one, `-m NAME:DIR` puts it into a table. Models that
somebody else trained are asked by `evaluate/baselines/`.
"""

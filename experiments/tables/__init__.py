"""The paper's tables and the reader's questions in miniature, on the toy: `python -m experiments.tables --help`."""

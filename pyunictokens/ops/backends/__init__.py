"""Backends of the operations, one file each. Importing a file enters what it offers into the table of ops/registry.py.

A new backend is a file here and a line in `registry.BACKENDS`.
"""

import importlib

from ..registry import BACKENDS
from . import cpu_head as cpu_head  # the other half of `cpu`

for _name in BACKENDS:
    if _name != "reference":
        importlib.import_module(f".{_name}", __name__)

"""Backends of the operations, one file each. Importing a file enters what it offers into the table of ops/registry.py.

A new backend is a file here and a line below.
"""

from . import cpu as cpu
from . import cpu_head as cpu_head
from . import cuda as cuda
from . import triton as triton

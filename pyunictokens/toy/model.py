"""The embedded toy as ready-made objects: a small Show-o, its image tokenizer and its text tokenizer.

How they were trained is experiments/build_toy.py's business; the toy's reward models are loaded by toy/rewards.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.errors import UserError

if TYPE_CHECKING:
    import torch

    from ..models.bundle import ModelBundle


def toy_folder() -> Path:
    """Where the toy's weights lie inside the package."""
    return Path(__file__).parent.parent / "assets" / "toy"


def load_toy(dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> ModelBundle:
    """Load the toy (float32 unless `dtype` says otherwise). Raises UserError when its files are not there."""
    import torch

    from ..models import registry
    from ..models.bundle import Sources

    folder = toy_folder()
    if not folder.is_dir():
        raise UserError(f"{folder}: the embedded toy is not in this installation; pass --model, --vq and --tokenizer")
    parts = {"vq": folder / "vq", "tokenizer": folder / "tokenizer"}
    bundle = registry.load(folder / "showo", dtype or torch.float32, device, **parts)
    bundle.sources = Sources()  # wherever the package lies, it is the toy
    return bundle

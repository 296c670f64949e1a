"""The embedded toy as ready-made objects: a small Show-o, its image tokenizer and its text tokenizer.

How they were trained is experiments/build_toy.py's business; the toy's reward experts are loaded by toy/rewards.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.errors import UserError

if TYPE_CHECKING:
    import torch

    from ..models.magvit import MagvitV2
    from ..models.showo.model import Showo
    from ..models.tokenizer import TextTokenizer

TOY_MAX_TEXT = 48
"""Text positions of the toy's drawing prompts, as it was trained."""


@dataclass
class Toy:
    """The toy's parts."""

    model: Showo
    vq: MagvitV2
    tokenizer: TextTokenizer


def toy_folder() -> Path:
    """Where the toy's weights lie inside the package."""
    return Path(__file__).parent.parent / "assets" / "toy"


def load_toy(dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Toy:
    """Load the toy (float32 unless `dtype` says otherwise). Raises UserError when its files are not there."""
    import torch

    from ..models.magvit import MagvitV2
    from ..models.showo.model import Showo
    from ..models.tokenizer import TextTokenizer

    folder = toy_folder()
    if not folder.is_dir():
        raise UserError(f"{folder}: the embedded toy is not in this installation; pass --model, --vq and --tokenizer")
    model = Showo.from_pretrained(folder / "showo", dtype=dtype or torch.float32, device=device)
    model.max_text = TOY_MAX_TEXT
    return Toy(
        model,
        MagvitV2.from_pretrained(folder / "vq", dtype=torch.float32, device=device),
        TextTokenizer.from_pretrained(folder / "tokenizer"),
    )

"""What may be asked of a served model, and what comes back: plain records. Checks are the business of engine.py.

Letters: N image codes, H×W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor


@dataclass(frozen=True, eq=False)
class ImageRequest:
    """Draw `samples` images of one prompt. What is None is the model's own (`SamplingRule`)."""

    prompt: str
    concept: str | None = None
    """The resident concept whose tokens the prompt is read with."""
    samples: int = 1
    steps: int | None = None
    guidance_scale: float | None = None
    temperature: float | None = None
    seed: int = 0
    """Image i draws the noise of (seed, first_sample + i), as row i of `generate_images` with this seed does."""
    first_sample: int = 0
    grid: tuple[int, int] | None = None
    """(height, width) in codes."""
    image: Tensor | None = None
    """float [3, H, W] in [−1, 1]: painted into, where `unknown` says."""
    unknown: Tensor | None = None
    """bool [N]: codes of `image` that are drawn anew."""
    previews: int = 0
    """How often an image is shown while it is drawn."""


@dataclass(frozen=True, eq=False)
class AnswerRequest:
    """Answer one question about one image, `samples` times."""

    image: Tensor
    """float [3, H, W] in [−1, 1]: of the model's own size, or a square of `RolloutEngine.features_side`."""
    question: str
    concept: str | None = None
    samples: int = 1
    max_new_tokens: int = 100
    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_k: int = 0
    seed: int = 0
    raw: bool = False
    """Whether the question has the model's wording around it already."""
    streamed: bool = False
    """Whether the text is told token by token."""


Request: TypeAlias = ImageRequest | AnswerRequest


@dataclass(frozen=True, eq=False)
class Taken:
    """`AsyncEngine` tells it first: the request can be used, and waits."""

    ticket: int


@dataclass(frozen=True, eq=False)
class Preview:
    """An image while it is drawn: what it would be if the codes that are still unknown kept their present values."""

    ticket: int
    sample: int
    number: int
    """0, 1, … of `previews`."""
    pixels: Tensor
    """float [3, H, W], about [−1, 1], on the CPU."""


@dataclass(frozen=True, eq=False)
class Drawn:
    """A finished image."""

    ticket: int
    sample: int
    codes: Tensor
    """int64 [N], on the CPU."""
    pixels: Tensor
    """float [3, H, W], about [−1, 1], on the CPU."""


@dataclass(frozen=True, eq=False)
class Written:
    """An answer so far, or whole."""

    ticket: int
    sample: int
    text: str
    tokens: tuple[int, ...]
    """The end token included where one was drawn."""
    done: bool
    cut: bool
    """Whether it ended because it had `max_new_tokens`, not by itself."""
    context: int
    """Positions of picture and question."""


@dataclass(frozen=True, eq=False)
class Ended:
    """The last event of a request. `error` is None where all of it was done."""

    ticket: int
    error: Exception | None = None


Event: TypeAlias = Taken | Preview | Drawn | Written | Ended

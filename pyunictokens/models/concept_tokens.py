"""A concept's learned tokens: `<name>` and its K + M (+ extra) helpers, as rows of embedding, head weight and bias.

They are the only new parameters of a personalised model: 25 rows against two matrices of 58 k × 2048. Reads and writes
the published files ``epoch_*_{embed,lm_head_weight,lm_head_bias}.pt`` and one safetensors file of our own. How rows are
trained is the business of `train`, where they sit among the ids that of `showo`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..utils.errors import UserError
from ..utils.files import read_json, safe_name, save_safetensors_atomic, write_json

_PARTS = ("embed", "head_weight", "head_bias")
_PUBLISHED = {"embed": "embed", "head_weight": "lm_head_weight", "head_bias": "lm_head_bias"}


def published_epochs(folder: Path) -> list[int]:
    """Epochs of the published files in `folder`, in order; copies and other names (`epoch_best_…`) are left alone."""
    found = (re.fullmatch(r"epoch_([0-9]{1,9})_embed\.pt", file.name) for file in folder.glob("epoch_*_embed.pt"))
    return sorted(int(match[1]) for match in found if match)


class ConceptTokens(nn.Module):
    """Rows of one concept: `<name>`, then `num_understanding` (K), `num_generation` (M) and `num_extra` helper tokens.

    Parameters (float32): embed [n, D], head_weight [n, D], head_bias [n], with n = 1 + K + M + extra. They start
    from N(0, 0.02), the head's too, and a zero bias; `seed` decides the draws.

    Raises UserError for a name that cannot be a folder's, a width below 1 or a negative number of tokens.
    """

    def __init__(
        self,
        name: str,
        width: int,
        num_understanding: int = 16,
        num_generation: int = 8,
        num_extra: int = 0,
        *,
        seed: int = 0,
    ):
        super().__init__()
        self.name = safe_name(name, "concept name")
        if width < 1 or min(num_understanding, num_generation, num_extra) < 0:
            raise UserError(
                f"width={width}, K={num_understanding}, M={num_generation}, extra={num_extra}: "
                "width must be ≥ 1 and the numbers of tokens ≥ 0"
            )
        self.width = width
        self.num_understanding, self.num_generation, self.num_extra = num_understanding, num_generation, num_extra
        # Drawn on the CPU, so that a seed means the same rows on every device.
        generator, device = torch.Generator().manual_seed(seed), torch.get_default_device()
        rows = [torch.randn(self.num_tokens, width, generator=generator, device="cpu") * 0.02 for _ in range(2)]
        self.embed, self.head_weight = (nn.Parameter(each.to(device)) for each in rows)
        self.head_bias = nn.Parameter(torch.zeros(self.num_tokens))

    @property
    def num_tokens(self) -> int:
        """n, the number of rows."""
        return 1 + self.num_understanding + self.num_generation + self.num_extra

    @property
    def sks(self) -> str:
        """The concept's own token, `<name>`: row 0."""
        return f"<{self.name}>"

    @property
    def tokens(self) -> list[str]:
        """Token strings in the order of the rows: `<name>`, `<token_0>`, `<token_1>`, …"""
        return [self.sks] + [f"<token_{i}>" for i in range(self.num_tokens - 1)]

    def rows(self, group: str) -> slice:
        """The rows of one group: "sks", "understanding", "generation" or "extra"."""
        ends = [0, 1, self.num_understanding, self.num_generation, self.num_extra]
        names = ["sks", "understanding", "generation", "extra"]
        if group not in names:
            raise ValueError(f"group {group!r}: must be one of {', '.join(names)}")
        index = names.index(group)
        start = sum(ends[: index + 1])
        return slice(start, start + ends[index + 1])

    def helpers(self, groups: Sequence[str] = ("understanding", "generation", "extra")) -> str:
        """The helper tokens of the given groups, one after another."""
        return "".join("".join(self.tokens[self.rows(group)]) for group in groups)

    def expand(
        self, text: str, groups: Sequence[str] = ("understanding", "generation", "extra"), every: bool = False
    ) -> str:
        """`text` with the first `<name>` preceded by the helper tokens of the given groups (paper, appendix D).

        Later mentions stay short: the helpers say the same thing each time and only use up positions. The published
        code puts them before `every` mention.
        """
        return text.replace(self.sks, self.helpers(groups) + self.sks, -1 if every else 1)

    def introduce(self, question: str, groups: Sequence[str] = ("understanding",)) -> str:
        """`question` behind the published sentence "<name> is <token_0>….", which tells what `<name>` is."""
        helpers = self.helpers(groups)
        return f"{self.sks} is {helpers}.{question}" if helpers else question

    def grown(self, num_extra: int, *, seed: int = 0) -> ConceptTokens:
        """A copy with `num_extra` more tokens behind the present ones (stage 3)."""
        new = ConceptTokens(
            self.name,
            self.width,
            self.num_understanding,
            self.num_generation,
            self.num_extra + num_extra,
            seed=seed,
        )
        with torch.no_grad():
            for part in _PARTS:
                getattr(new, part)[: self.num_tokens] = getattr(self, part)
        return new.to(self.embed.device)

    # --- files -----------------------------------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write concept.safetensors and concept.json into `folder`; returns it."""
        folder = Path(folder)
        save_safetensors_atomic(folder / "concept.safetensors", dict(self.named_parameters()))
        write_json(
            folder / "concept.json",
            {
                "name": self.name,
                "width": self.width,
                "num_understanding": self.num_understanding,
                "num_generation": self.num_generation,
                "num_extra": self.num_extra,
            },
        )
        return folder

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> ConceptTokens:
        """Read what :meth:`save` wrote. Raises UserError when a file is missing, cut short, damaged or of another
        shape."""
        from .checkpoint import load_tensors

        folder = Path(folder)
        about = read_json(folder / "concept.json")
        tensors = load_tensors(folder / "concept.safetensors")
        try:
            sizes = [about.get(f"num_{group}", 0) for group in ("understanding", "generation", "extra")]
            found, wanted = tuple(tensors["embed"].shape), (1 + sum(sizes), about["width"])
            if found != wanted:  # ahead of making rows: the file may ask for any number
                raise UserError(f"{folder}: embed of shape {found}: must be {wanted}")
            concept = cls(**about)
        except (TypeError, AttributeError, KeyError) as error:
            raise UserError(f"{folder / 'concept.json'}: {type(error).__name__}: {error}") from None
        concept._put(tensors, folder)
        return concept

    def save_pretrained(self, folder: str | os.PathLike[str], base_model: str | None = None) -> Path:
        """:meth:`save` with a model card; returns the folder."""
        from .hub import Card

        text = f"""Tokens of one concept, `{self.sks}`, learned by pyunictokens: {self.num_tokens} rows of width
{self.width} beside the embedding and the head of {base_model or "a frozen model"}.

```python
import pyunictokens as uct

concept = uct.ConceptTokens.from_pretrained("OWNER/NAME")
```
"""
        self.save(folder)
        Card(f"The concept {self.sks}", text, base_model, tags=["personalization"]).write(folder)
        return Path(folder)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> ConceptTokens:
        """Read what :meth:`save` or :meth:`save_pretrained` wrote: a folder or hub id."""
        from .checkpoint import resolve

        return cls.load(resolve(path, only=("concept.json", "concept.safetensors")))

    def push_to_hub(self, to: str | os.PathLike[str], *, base_model: str | None = None, private: bool = True) -> str:
        """:meth:`save_pretrained` to a hub id or an empty folder (hub.py); returns where it lies."""
        from .hub import publish

        return publish(lambda folder: self.save_pretrained(folder, base_model), to, private=private)

    @classmethod
    def load_published(
        cls,
        folder: str | os.PathLike[str],
        name: str,
        epoch: int | None = None,
        num_understanding: int = 16,
        num_generation: int | None = None,
    ) -> ConceptTokens:
        """Read `epoch_<n>_{embed,lm_head_weight,lm_head_bias}.pt`, the newest epoch unless one is named.

        Row 0 is `<name>`; M is what is left after K unless given; rows beyond K and M count as extra.
        """
        from .checkpoint import refuse_odd, unpickle

        folder = Path(folder)
        epochs = published_epochs(folder)
        if not epochs or (epoch is not None and epoch not in epochs):
            raise UserError(
                f"{folder}: no epoch_{'*' if epoch is None else epoch}_embed.pt; present: {epochs or 'none'}"
            )
        epoch = epochs[-1] if epoch is None else epoch
        parts: dict[str, Tensor] = {}
        for part, published in _PUBLISHED.items():
            file = folder / f"epoch_{epoch}_{published}.pt"
            content = unpickle(file)
            if not isinstance(content, Tensor):
                raise UserError(f"{file}: must hold one tensor, holds {type(content).__name__}")
            refuse_odd(content, file)
            parts[part] = content
        rows = (parts["embed"].shape or (0,))[0] - 1
        if parts["embed"].ndim != 2 or rows < num_understanding + (num_generation or 0):
            raise UserError(
                f"{folder}: embedding of shape {tuple(parts['embed'].shape)}: must be [1 + K + M, D] with K="
                f"{num_understanding}" + (f", M={num_generation}" if num_generation is not None else "")
            )
        generation = rows - num_understanding if num_generation is None else num_generation
        extra = rows - num_understanding - generation
        concept = cls(name, parts["embed"].shape[1], num_understanding, generation, extra)
        concept._put(parts, folder)
        return concept

    def save_published(self, folder: str | os.PathLike[str], epoch: int) -> None:
        """Write the three published files for `epoch`."""
        import io

        from ..utils.files import write_bytes_atomic

        for part, published in _PUBLISHED.items():
            buffer = io.BytesIO()
            torch.save(getattr(self, part).detach().cpu().clone(), buffer)
            write_bytes_atomic(Path(folder) / f"epoch_{epoch}_{published}.pt", buffer.getvalue())

    def _put(self, parts: dict[str, Tensor], origin: object) -> None:
        for part in _PARTS:
            mine = getattr(self, part)
            if part not in parts or parts[part].shape != mine.shape:
                found = tuple(parts[part].shape) if part in parts else "nothing"
                raise UserError(f"{origin}: {part} of shape {found}: must be {tuple(mine.shape)}")
        with torch.no_grad():
            for part in _PARTS:
                getattr(self, part).copy_(parts[part].float())

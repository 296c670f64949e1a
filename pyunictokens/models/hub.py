"""What is published: a model card, and a folder that goes to the hub or to another folder.

It names licences by family; the card of a run is written by runs/model_card.py.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from ..utils.errors import UserError, needs
from ..utils.files import write_text_atomic

CARD = "README.md"
LICENSES = {"show-o": "apache-2.0", "amused": "openrail++", "mmada": "mit", "llada": "mit", "toy": "apache-2.0"}
"""Of the published weights of each family, as the hub names them."""
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Card:
    """A model card: what the hub sorts by, and the text."""

    title: str
    text: str
    base_model: str | None = None
    license: str | None = None
    """None: not known here."""
    pipeline_tag: str = "text-to-image"
    library: str = "pyunictokens"
    tags: Sequence[str] = field(default_factory=list)

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Write README.md into `folder`; returns it."""
        with needs("train"):
            from huggingface_hub import ModelCardData

        front = ModelCardData(
            base_model=self.base_model,
            license=self.license or "other",
            library_name=self.library,
            pipeline_tag=self.pipeline_tag,
            tags=["pyunictokens", "reinforcement-learning", *self.tags],
        )
        file = Path(folder) / CARD
        write_text_atomic(file, f"---\n{front.to_yaml()}\n---\n\n# {self.title}\n\n{self.text.strip()}\n")
        return file


def hub_id(to: str | os.PathLike[str]) -> str | None:
    """The hub id (owner/name) that `to` means; None where it is a folder: a Path, an absolute or relative one (./, ../,
    ~), or one that is there. ``hub:owner/name`` always means the hub."""
    text = str(to)
    if text.startswith("hub:"):
        if not _HUB_ID.fullmatch(text.removeprefix("hub:")):
            raise UserError(f"{text}: must be hub:owner/name")
        return text.removeprefix("hub:")
    folder = isinstance(to, os.PathLike) or text.startswith((".", "~", "/")) or Path(text).exists()
    if folder or not _HUB_ID.fullmatch(text):
        return None
    return text


def publish(
    write: Callable[[Path], object], to: str | os.PathLike[str], *, private: bool = True, message: str | None = None
) -> str:
    """Have `write` fill a folder and bring it to `to`, a hub id or a folder; returns where it lies.

    A repository of the hub is made where there is none, `private` unless said otherwise; the token is the one that
    `hf auth login` keeps, or HF_TOKEN. Raises UserError for a folder that holds something, and where the hub refuses.
    """
    repository = hub_id(to)
    with TemporaryDirectory() as aside:
        made = Path(aside) / "made"
        made.mkdir()
        write(made)
        if repository is None:
            place = Path(to).expanduser()
            if place.exists() and (not place.is_dir() or any(place.iterdir())):
                raise UserError(f"{place}: already holds something: name a folder that is empty or not there yet")
            shutil.copytree(made, place, dirs_exist_ok=True)
            return str(place)
        with needs("train"):
            from huggingface_hub import HfApi
            from huggingface_hub.errors import HfHubHTTPError

        api = HfApi()
        try:
            url = api.create_repo(repository, private=private, exist_ok=True)
            api.upload_folder(repo_id=repository, folder_path=str(made), commit_message=message or "pyunictokens")
        except (HfHubHTTPError, OSError, ValueError) as error:  # ValueError: no token, or a name that cannot be
            raise UserError(
                f"{repository}: the hub refused or cannot be reached ({type(error).__name__}: {error}): log in with "
                "`hf auth login`, or name a folder"
            ) from error
        return str(url)


def model_card(family: str, sizes: dict[str, object], writes: bool) -> Card:
    """The card of whole weights that are published on their own."""
    lines = [f"| {name} | {value} |" for name, value in sizes.items()]
    text = f"""Weights of the family `{family}`, written by pyunictokens.

```python
import pyunictokens as uct

bundle = uct.models.load("OWNER/NAME")
```

| | |
|---|---|
{chr(10).join(lines)}

The licence is that of the published weights of this family; look at where yours come from.
"""
    tag = "text-generation" if writes else "text-to-image"
    return Card(f"{family} by pyunictokens", text, license=LICENSES.get(family), pipeline_tag=tag)

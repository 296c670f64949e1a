"""DreamBench (the DreamBooth data set) as subjects: 25 prompts a subject, by whether it is alive; CLIP-I and CLIP-T.

    ROOT/NAME/{00.jpg …}             or ROOT/dataset/NAME/…: four to six photos a subject
    ROOT/prompts_and_classes.txt     lines ``subject,class`` under "Classes"; read if there

A folder brings its own prompts with ``prompts.json`` ({"object": […], "live": […]}, `{}` for the subject); otherwise
the templates of dreambooth.py are used. All photos are references; a real image is not compared with itself.
"""

from __future__ import annotations

import re
from pathlib import Path

from ...utils.errors import UserError
from ...utils.spelling import on_disk
from ...utils.text import read_text
from ..tasks import Item, Subject
from .dreambooth import is_live, templates
from .files import folders, optional_json, pictures, words

CLASSES, PROMPTS = "prompts_and_classes.txt", "prompts.json"
_LINE = re.compile(r"^\s*([\w-]+)\s*,\s*([\w \-]+?)\s*$")


def names(root: Path) -> list[str]:
    """Subjects with photos. Raises UserError where there is none."""
    base = _base(root)
    found = [name for name in folders(base) if pictures(base / name)]
    if not found:
        raise UserError(f"{root}: no folder of photos in it: give the folder that holds one folder a subject")
    return found


def read(root: Path, name: str) -> Subject:
    """Subject `name` with its prompts."""
    base = _base(root)
    class_word = _classes(base).get(name, name.rstrip("0123456789").replace("_", " "))
    live = is_live(class_word)
    subject = Subject(name, class_word, "animal" if live else "object", references=pictures(base / name))
    prompts = own_prompts(base, live) or templates(class_word, live)
    subject.items = [Item("pure", prompt.replace("{}", subject.sks)) for prompt in prompts]
    return subject


def own_prompts(base: Path, live: bool) -> list[str] | None:
    """The prompts of `base`/prompts.json for live subjects or for objects; None where there is no such file."""
    own = optional_json(base / PROMPTS)
    if own is None:
        return None
    names = ("live", "live_subject") if live else ("object",)
    listed = next((own[name] for name in names if name in own), None) if isinstance(own, dict) else None
    if not isinstance(listed, list) or not listed:
        raise UserError(f"{base / PROMPTS}: needs the lists object and live, with {{}} where the subject goes")
    return [words(text, f"{base / PROMPTS}") for text in listed]


def _base(root: Path) -> Path:
    return root / "dataset" if (root / "dataset").is_dir() else root


def _classes(base: Path) -> dict[str, str]:
    """{subject: class} of prompts_and_classes.txt; {} where there is no such file."""
    file = on_disk(base / CLASSES)
    if not file.is_file():
        return {}
    found = {}
    for line in read_text(file).splitlines():
        if line.strip().lower() == "prompts":
            break
        match = _LINE.match(line)
        if match and match[1] != "subject_name":
            found[match[1]] = match[2]
    return found

"""A real server over the shipped toy, in a thread, with runs made for the tests."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

from pyunictokens import ConceptTokens
from pyunictokens.models import Sources
from pyunictokens.serve.catalog import CatalogSettings, Limits
from pyunictokens.serve.keys import Keys
from pyunictokens.serve.server import Server, ServerSettings
from pyunictokens.toy.model import load_toy


def concept_run(folder: Path, concept: str = "bo", seed: int = 0, facts: tuple[str, ...] = ()) -> Path:
    """A run that learned concept tokens alone; they are far from zero, so that pictures show them."""
    made = ConceptTokens(concept, load_toy().model.width, 4, 4, seed=seed)
    with torch.no_grad():
        made.embed.mul_(20)
    made.save(folder / "concept")
    (folder / "about.json").write_text(json.dumps({"name": concept, "extra_info": list(facts)}))
    return folder


def weights_run(folder: Path, concept: str = "ann") -> Path:
    """A run with weights of its own."""
    bundle = load_toy()
    with torch.no_grad():
        bundle.model.image_head()[0].mul_(0.5)
    (folder / "final").mkdir(parents=True)
    bundle.model.save_pretrained(folder / "final" / "model")
    ConceptTokens(concept, bundle.model.width, 4, 4).save(folder / "final" / "concept")
    (folder / "final" / "policy.json").write_text(json.dumps({"trainable": "full"}))
    return folder


@contextlib.contextmanager
def running(
    folder: Path,
    keys: Keys | None = None,
    settings: ServerSettings | None = None,
    limits: Limits | None = None,
) -> Iterator[Server]:
    """A server of every run in `folder`, until the context ends."""
    settings = settings or ServerSettings(port=0)
    server = Server(
        CatalogSettings(folder=folder, flags=Sources(), device="cpu", limits=limits or Limits()),
        keys or Keys([]),
        settings,
    )
    stop = threading.Event()
    thread = threading.Thread(target=server.serve, args=(stop.is_set,))
    thread.start()
    try:
        yield server
    finally:
        stop.set()
        thread.join(60)
        assert not thread.is_alive(), "the server did not end"

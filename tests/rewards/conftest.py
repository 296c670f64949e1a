"""The small random checkpoints, written once a session."""

from __future__ import annotations

import pytest

from . import checkpoints
from .checkpoints import Folders


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A folder each for ERNIE, BLIP-2, DINOv2 and FaceNet."""
    for library in ("facenet_pytorch", "torchvision"):
        pytest.importorskip(library, reason="the paper's networks need the extra `rewards`; `dev` brings it too")
    root = tmp_path_factory.mktemp("weights")
    return Folders(
        checkpoints.save_ernie(root / "ernie"),
        checkpoints.save_blip2(root / "blip2"),
        checkpoints.save_dinov2(root / "dinov2"),
        checkpoints.save_facenet(root / "facenet"),
    )

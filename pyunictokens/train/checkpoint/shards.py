"""State that is spread over ranks, on disk: each rank's part is a safetensors file, written by
torch.distributed.checkpoint and read by any number of ranks. Imported where it is used, because what it imports takes a
second.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ...utils.errors import UserError
from ..distributed.ranks import Ranks


def own_files(folder: Path, rank: int) -> list[Path]:
    """The files that `rank` wrote with :func:`write_shards`."""
    return sorted(folder.glob(f"shard-{rank + 1:05d}-*.safetensors"))


def write_shards(folder: Path, state: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Write `state` into `folder`, each rank its own part, all ranks together. Raises UserError on all alike."""
    with _as_user_error(folder), ranks.noticing():
        writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
        dcp.save(dict(state), storage_writer=writer, process_group=ranks.group)


def read_parts(folder: Path, state: dict[str, Tensor], ranks: Ranks) -> None:
    """Fill the tensors of `state`, whole or spread over `ranks`, from `folder`, all ranks together."""
    with _as_user_error(folder), ranks.noticing():
        dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), process_group=ranks.group)


def read_whole(folder: Path) -> dict[str, Tensor]:
    """All tensors of `folder`, whole, in this process alone."""
    state = {name: torch.zeros(shape) for name, shape in shapes(folder).items()}
    with _as_user_error(folder), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled")
        dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)
    return state


def shapes(folder: Path) -> dict[str, torch.Size]:
    """The shapes of the tensors in `folder`, by name."""
    with _as_user_error(folder):
        found = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: value.size for name, value in found.items() if isinstance(value, TensorStorageMetadata)}


@contextmanager
def _as_user_error(folder: Path) -> Iterator[None]:
    """What goes wrong with the files of `folder` as one UserError (an OSError passes: its reader names it better)."""
    try:
        yield
    except CheckpointException as error:
        reasons = {rank: failure[0] for rank, failure in error.failures.items()}
        first = min(reasons)
        if isinstance(reasons[first], OSError):
            raise reasons[first] from error
        raise UserError(f"{folder}: rank {first}: {type(reasons[first]).__name__}: {reasons[first]}") from error
    except Exception as error:
        if type(error).__name__ == "SafetensorError":
            raise UserError(f"{folder}: not a whole safetensors file: {error}") from error
        raise

"""A run's folder: who it belongs to, its checkpoints, and how it is taken up again as if it had never stopped.

    run.json             identity of model, concept and settings, written when the run begins
    checkpoints/step_N/  tensors.safetensors (trained tensors, optimizer) and state.json (step, thresholds, checksums);
                         shards/ with a file a rank, where the optimizer's state is spread over ranks

A checkpoint is written aside, flushed to disk and renamed, so a kill or a full disk leaves the last good one; one that
was damaged later is noticed by its checksum and the one before it is taken. Rank 0 alone writes, but for the shards,
and renames a checkpoint when all of them are there; all ranks see one file system. What the tensors mean is the
business of train/policy.py and train/optimizer.py.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...config.settings import filled, renamed, to_mapping
from ...config.training import GrpoConfig
from ...models import MaskedModel
from ...utils import fingerprint
from ...utils.errors import UserError
from ...utils.files import AnyJson, folder_lock, read_json, read_safetensors, safe_name, sweep, sync_folder, write_json
from ..distributed.ranks import Ranks
from .tensors import write_tensors

log = logging.getLogger(__name__)

MAY_CHANGE = frozenset(
    {
        "checkpoint_every",
        "keep_last",
        "keep_best",
        "patience",
        "sample_every",
        "report_to",
        "reward_timeout",
        "max_bad_steps",
        "micro_rows",
        "micro_timesteps",
        "checkpoint_layers",
        "shard",
        "offload",
        "rollout_gather",
        "save_in_background",
    }
)
"""Settings that a resumed run may change: they alter no number but the rounding of a sum."""

SHARDS = "shards"
"""The folder, in a checkpoint, of what was spread over ranks."""


@dataclass
class Checkpoint:
    """What one checkpoint holds."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, AnyJson]
    folder: Path
    shards: Path | None = None
    """Where tensors are that were spread over ranks (shards.py)."""


def identity(model: MaskedModel) -> dict[str, object]:
    """What must agree before a checkpoint may be put into a model: sizes, vocabulary, starting weights."""
    return {
        **model.identity(),
        "max_text": model.max_text,
        "starting_weights": fingerprint.of_tensors(model.state_dict()),
    }


class RunFolder:
    """The folder of one run, locked while this object is open.

    A folder that holds a run is refused unless `resume`; with it, identity and settings must be the run's own. With
    several `ranks` each has such an object; rank 0 holds the lock, and opening, :meth:`latest` and :meth:`save` are
    called by all together.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        identity: Mapping[str, object],
        settings: Mapping[str, object],
        *,
        resume: bool = False,
        ranks: Ranks | None = None,
    ):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.ranks = ranks or Ranks()
        self._held = ExitStack()
        if self.ranks.first:
            self._open(identity, settings, resume)
        self.ranks.barrier()

    def _open(self, identity: Mapping[str, object], settings: Mapping[str, object], resume: bool) -> None:
        about = self.path / "run.json"
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: is a file; a run needs a folder")
        if not resume and about.exists():
            raise UserError(f"{self.path}: already holds a run: go on with it (--resume) or choose another folder")
        if resume and not about.exists():
            raise UserError(f"{self.path}: holds no run to resume (no run.json): start one without --resume")
        self.path.mkdir(parents=True, exist_ok=True)
        self._held.enter_context(folder_lock(self.path))
        try:
            if resume:
                self._compare(read_json(about), identity, settings)
            sweep(self.path, inside=resume)
            if not resume:
                write_json(about, {"identity": dict(identity), "settings": dict(settings)})
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let others use the folder."""
        self._held.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _compare(self, found: object, identity: Mapping[str, object], settings: Mapping[str, object]) -> None:
        if not isinstance(found, dict) or not {"identity", "settings"} <= found.keys():
            raise UserError(f"{self.path / 'run.json'}: is not the description of a run")
        defaults = to_mapping(GrpoConfig()) | {"groups": 1}  # what stood for one before it could be left open
        stored = found["settings"] if isinstance(found["settings"], Mapping) else {}
        there, here = (filled(renamed(GrpoConfig, each), defaults) for each in (stored, settings))
        then = found["identity"]
        if isinstance(then, Mapping) and "max_text" not in then:  # it was a setting; none meant the model's own
            then = {**then, "max_text": stored.get("max_text") or identity.get("max_text")}
        wrong = [
            f"{key}: the run has {before!r}, this is {now!r}"
            for part, pair in (("identity", (then, identity)), ("settings", (there, here)))
            for key, before, now in _differences(*pair)
            if part == "identity" or key.rpartition(".")[2] not in MAY_CHANGE
        ]
        if wrong:
            raise UserError(f"{self.path}: this run cannot be resumed with what was given: {'; '.join(wrong)}")

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, object],
        keep_last: int,
        keep_best: int = 0,
        shards: Mapping[str, Tensor] | None = None,
        ranks: Ranks | None = None,
    ) -> Path:
        """Write the checkpoint of `step`, then delete all but the last `keep_last` and the `keep_best` of the highest
        ``state["reward"]``. Raises UserError where it cannot be written, as on a full disk.

        `shards` are tensors spread over ranks; with them all ranks write together (`ranks`: those of another thread).
        """
        final, ranks = self.checkpoints / f"step_{step:06d}", ranks or self.ranks
        aside = self.checkpoints / f".step_{step:06d}.part"
        try:
            if ranks.first:
                self.checkpoints.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir()
            checksums = _write_shards(aside / SHARDS, shards, ranks) if shards else None
            if ranks.first:
                digest = write_tensors(aside / "tensors.safetensors", tensors)
                whole = {"step": step, "sha256": digest, **({"shards": checksums} if shards else {}), **state}
                write_json(aside / "state.json", {**whole, "state_sha256": _state_checksum(whole)})
                sync_folder(aside)
                if final.exists():  # a damaged one that was passed over on resume
                    shutil.rmtree(final)
                os.rename(aside, final)
                sync_folder(self.checkpoints)
        except OSError as error:
            if ranks.first:
                shutil.rmtree(aside, ignore_errors=True)
            steps = self.steps()
            last = f"the last good one is step {steps[-1]}" if steps else "there is none yet"
            raise UserError(
                f"{final}: the checkpoint cannot be written ({error.strerror or error}); {last}: "
                "make room and go on with --resume"
            ) from error
        if ranks.first:
            steps = self.steps()
            for old in set(steps[:-keep_last]) - set(self._best(steps, keep_best)):
                shutil.rmtree(self.checkpoints / f"step_{old:06d}", ignore_errors=True)
        return final

    def _best(self, steps: list[int], number: int) -> list[int]:
        """The `number` steps of the highest reward, of equals the later; damaged ones are not among them."""
        rewards: dict[int, float] = {}
        for step in steps if number else []:
            try:
                reward = self._state(step).get("reward")
            except UserError as error:
                log.warning("checkpoint of step %d is not counted among the best: %s", step, error)
                continue
            if isinstance(reward, float) and math.isfinite(reward):
                rewards[step] = reward
        return sorted(rewards, key=lambda step: (rewards[step], step))[-number:] if number else []

    def steps(self) -> list[int]:
        """Steps of the checkpoints present, in order."""
        names = [folder.name for folder in self.checkpoints.glob("step_*")] if self.checkpoints.is_dir() else []
        return sorted(int(name[5:]) for name in names if name[5:].isdigit())

    def latest(self) -> Checkpoint | None:
        """The newest whole checkpoint, None when there is none. Raises UserError when all are damaged.

        Ranks share the checking of shards, and take the same checkpoint.
        """
        problems = []
        for step in reversed(self.ranks.broadcast(self.steps())):
            found = [problem for problem in self.ranks.gather(self._problem(step)) if problem]
            if not found:
                return self._read(step)
            problems.append(found[0])
            if self.ranks.first:
                log.warning("checkpoint of step %d passed over: %s", step, found[0])
        if problems:
            raise UserError(f"{self.checkpoints}: no whole checkpoint: {'; '.join(problems)}")
        return None

    def _state(self, step: int) -> dict[str, AnyJson]:
        file = self.checkpoints / f"step_{step:06d}" / "state.json"
        state = read_json(file)
        if not isinstance(state, dict) or state.get("step") != step:
            raise UserError(f"{file}: is not the state of step {step}")
        if state.pop("state_sha256", None) != _state_checksum(state):
            raise UserError(f"{file}: is damaged (its checksum does not fit)")
        return state

    def _problem(self, step: int) -> str:
        """What is wrong with the checkpoint of `step`, as far as this rank looks; "" where nothing is."""
        folder = self.checkpoints / f"step_{step:06d}"
        try:
            state = self._state(step)
            wanted = {Path("tensors.safetensors"): state.get("sha256")}
            shards = state.get("shards") or {}
            if not isinstance(shards, dict):
                raise UserError(f"{folder / 'state.json'}: shards must be a table of checksums")
            wanted.update({Path(SHARDS, safe_name(name, "shard")): digest for name, digest in shards.items()})
            for file in sorted(wanted)[self.ranks.rank :: self.ranks.world]:
                _hold_against(folder / file, wanted[file])
            if self.ranks.first:
                read_safetensors(folder / "tensors.safetensors")
        except UserError as error:
            return str(error)
        return ""

    def _read(self, step: int) -> Checkpoint:
        folder = self.checkpoints / f"step_{step:06d}"
        state = self._state(step)
        shards = folder / SHARDS if state.get("shards") else None
        return Checkpoint(step, read_safetensors(folder / "tensors.safetensors"), state, folder, shards)


def _write_shards(folder: Path, shards: Mapping[str, Tensor], ranks: Ranks) -> dict[str, str]:
    """Write them, all ranks together; returns the checksums of all files by name."""
    from .shards import own_files, write_shards

    if ranks.first:
        folder.mkdir()
    ranks.barrier()
    write_shards(folder, shards, ranks)
    own = {file.name: fingerprint.of_file(file) for file in own_files(folder, ranks.rank)}
    if ranks.first:
        sync_folder(folder)
    return {name: digest for part in ranks.gather(own) for name, digest in part.items()}


def _hold_against(file: Path, wanted: object) -> None:
    """Raise UserError where `file` is missing or has another checksum than it was written with."""
    if not file.exists():
        raise UserError(f"{file}: no such file")
    found = fingerprint.of_file(file)
    if found != wanted:
        raise UserError(f"{file}: is damaged (checksum {found[:12]}…, written as {str(wanted)[:12]}…)")


def random_state() -> dict[str, Tensor]:
    """PyTorch's random states as tensors."""
    states = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states.update({f"rng.cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())})
    return states


def restore_random_state(tensors: Mapping[str, Tensor]) -> None:
    """Put back what :func:`random_state` gave; states of absent devices are left out."""
    if "rng.cpu" in tensors:
        torch.set_rng_state(tensors["rng.cpu"].clone())
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"rng.cuda.{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"rng.cuda.{index}"].clone(), index)


def _differences(there: object, here: object, prefix: str = "") -> list[tuple[str, object, object]]:
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        found = []
        for key in sorted(there.keys() | here.keys()):
            found += _differences(there.get(key), here.get(key), f"{prefix}{key}.")
        return found
    return [] if there == here else [(prefix.rstrip("."), there, here)]


def _state_checksum(state: Mapping[str, object]) -> str:
    """SHA-256 of the state's numbers and words, whatever the layout of the file."""
    return hashlib.sha256(json.dumps(state, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

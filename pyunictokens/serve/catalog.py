"""The models that are served, by name: runs on disk, opened when somebody asks for them and let go when unused.

A run that learned concept tokens alone is a few rows beside the base model, which all such runs of it share; many are
resident at once. A run with weights of its own (LoRA or all) is a model of its own; few are. In both, the one that was
not asked for the longest makes room, unless a request still needs it. `base` is the model without a concept.

A name that a client sends is looked up among the names that were found, and never becomes a path.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from ..models import ConceptTokens, ModelBundle, Sources, TextTokenizer
from ..rollout.engine import RolloutEngine
from ..rollout.serving import ServingEngine
from ..runs.asking import SamplingConfig, sampling
from ..runs.bundle import open_bundle
from ..runs.run_dir import BASE, Run
from ..utils.errors import UserError
from ..utils.files import read_json, safe_name


class UnknownModel(UserError):
    """No model of this name is served."""


@dataclass(frozen=True)
class Listed:
    """A model that may be asked for."""

    name: str
    path: Path | None
    """None: the base model."""
    created: int
    """Seconds since 1970."""


@dataclass(frozen=True, eq=False)
class Served:
    """A model that is open."""

    name: str
    engine: RolloutEngine
    concept: ConceptTokens | None
    tokenizer: TextTokenizer | None
    """The one that knows the concept's tokens, whether the concept is at hand or not."""
    resident: str | None
    """Under which name the engine keeps the concept; None where it is attached to the model, or there is none."""
    facts: tuple[str, ...]
    published: bool
    """Whether its tokens are asked in UniCTokens' form."""
    sampling: SamplingConfig
    looks_at: int
    """Pixels along one side of the squares that questions are asked about."""


@dataclass(frozen=True)
class Limits:
    """How much stays open."""

    concepts: int = 200
    """Concepts beside a base model."""
    models: int = 2
    """Runs with weights of their own."""


@dataclass(frozen=True)
class CatalogSettings:
    """Which models are served, and how they are opened: runs by their paths; every run in a folder, also those that
    come later. Sources, device and dtype as for `generate`."""

    runs: tuple[str, ...] = ()
    folder: Path | None = None
    flags: Sources = field(default_factory=Sources)
    device: str = "auto"
    dtype: str = "auto"
    limits: Limits = field(default_factory=Limits)

    def open(self, serving: ServingEngine) -> Catalog:
        """The catalog of an engine."""
        return Catalog(
            self.runs,
            self.folder,
            flags=self.flags,
            device=self.device,
            dtype=self.dtype,
            limits=self.limits,
            in_use=serving.concepts_in_use,
        )


class Catalog:
    """Finds and opens models.

    runs: paths of runs. folder: every run in it, also those that come later. Sources, device and dtype as for
    `generate`. Its methods may be called from any thread but :meth:`seat`, which belongs to the engine's.
    """

    def __init__(
        self,
        runs: Sequence[str] = (),
        folder: Path | None = None,
        *,
        flags: Sources | None = None,
        device: str = "auto",
        dtype: str = "auto",
        limits: Limits | None = None,
        in_use: Callable[[RolloutEngine], set[str]] = lambda engine: set(),
    ):
        self._flags, self._device, self._dtype = flags or Sources(), device, dtype
        self._limits, self._folder, self._in_use = limits or Limits(), folder, in_use
        self._lock, self._loading = threading.Lock(), threading.Lock()
        self._reader = ThreadPoolExecutor(1, "open model")
        self._bases: dict[tuple[Sources, int | None], ModelBundle] = {}
        self._engines: dict[tuple[Sources, int | None], RolloutEngine] = {}
        self._own: OrderedDict[str, tuple[float, Served]] = OrderedDict()
        self._shared: OrderedDict[str, tuple[float, Served]] = OrderedDict()
        if folder is not None and not folder.is_dir():
            raise UserError(f"{folder}: no such folder; give one that holds runs of `train`")
        self._named: dict[str, Listed] = {BASE: Listed(BASE, None, 0)}
        for given in runs:
            if given == BASE:
                continue
            run = Run.find(given)
            assert run.path is not None
            name = safe_name(run.path.resolve().name, "run")
            if name in self._named:
                raise UserError(f"{given}: two runs are called {name}: rename one of the folders")
            self._named[name] = _listed(name, run.path)
        self._check_names()

    def _check_names(self) -> None:
        twice = self._named.keys() & self._in_folder().keys()
        if twice:
            raise UserError(
                f"{self._folder}: holds a run called {sorted(twice)[0]}, which is named as well: leave one out"
            )

    def _in_folder(self) -> dict[str, Listed]:
        """The runs of the folder as it is now."""
        if self._folder is None:
            return {}
        found = {}
        for path in sorted(self._folder.iterdir()):
            if _is_name(path.name) and _is_run(path):
                found[path.name] = _listed(path.name, path)
        return found

    def list(self) -> list[Listed]:
        """All that may be asked for."""
        return list((self._in_folder() | self._named).values())

    def find(self, name: str) -> Listed:
        """The model of a name. Raises UnknownModel with the names there are."""
        found = self._named.get(name)
        folder = self._folder
        if found is None and folder is not None and _is_name(name) and name in os.listdir(folder):
            found = _listed(name, folder / name) if _is_run(folder / name) else None
        if found is None:
            names = [each.name for each in self.list()]
            more = f" and {len(names) - 20} more" if len(names) > 20 else ""
            raise UnknownModel(f"no model {name!r} is served here: there are {', '.join(names[:20])}{more}")
        return found

    def open(self, name: str) -> Served:
        """The model of a name, read from disk where it is not open. Raises UnknownModel, or UserError for a run that
        cannot be read."""
        listed = self.find(name)
        stamp = _stamp(listed.path)
        with self._loading:  # not the other lock: the engine goes on while a model is read
            served = self._kept(name, stamp)
            if served is not None:
                return served
            run = Run.find(BASE if listed.path is None else str(listed.path))
            own = listed.path is not None and _has_weights(listed.path)
            served = self._with_weights(name, run) if own else self._on_base(name, run)
            with self._lock:
                (self._own if own else self._shared)[name] = stamp, served
                while len(self._own) > self._limits.models:
                    self._own.popitem(last=False)
                for old in list(self._shared)[: max(0, len(self._shared) - self._limits.concepts - 1)]:
                    del self._shared[old]  # read again when it is asked for
        return served

    async def opened(self, name: str) -> Served:
        """The same for coroutines. Models are read in a thread of their own: who waits for one holds up nobody else."""
        served = await asyncio.to_thread(self._at_hand, name)
        if served is not None:
            return served
        return await asyncio.get_running_loop().run_in_executor(self._reader, self.open, name)

    def _at_hand(self, name: str) -> Served | None:
        return self._kept(name, _stamp(self.find(name).path))

    def _kept(self, name: str, stamp: float) -> Served | None:
        """The open model of a name, unless it was trained on since."""
        with self._lock:
            for kept in (self._own, self._shared):
                if name in kept and kept[name][0] == stamp:
                    kept.move_to_end(name)
                    return kept[name][1]
        return None

    def seat(self, served: Served) -> RolloutEngine:
        """The engine of a model, its concept resident. To be called in the thread of the engine."""
        if served.resident is not None and served.concept is not None:
            residents = served.engine.residents
            if served.resident not in residents.names or residents.rows(served.resident) is not served.concept:
                served.engine.add_concept(served.concept, served.resident)
            self._evict(served)
        return served.engine

    @property
    def resident(self) -> int:
        """Concepts at hand."""
        return sum(len(engine.concepts) for engine in list(self._engines.values()))

    # --- opening -----------------------------------------------------------------------------------------------------

    def _base(self, run: Run) -> tuple[ModelBundle, RolloutEngine]:
        key = (run.sources(self._flags), run.origin.max_text if run.path is not None else None)
        if key not in self._bases:
            bundle = self._bases[key] = open_bundle(key[0], self._device, self._dtype, key[1])
            self._engines[key] = RolloutEngine(bundle.model, bundle.vq, bundle.tokenizer)
        return self._bases[key], self._engines[key]

    def _on_base(self, name: str, run: Run) -> Served:
        bundle, engine = self._base(run)
        concept = None
        if run.path is not None:
            concept = run.concept_tokens(name).to(bundle.device).requires_grad_(False)
        return self._served(name, run, bundle, engine, concept, None if concept is None else name)

    def _with_weights(self, name: str, run: Run) -> Served:
        bundle = run.open(self._flags, self._device, self._dtype, name)
        return self._served(name, run, bundle, RolloutEngine.of(bundle), bundle.concept, None)

    def _served(
        self,
        name: str,
        run: Run,
        bundle: ModelBundle,
        engine: RolloutEngine,
        concept: ConceptTokens | None,
        resident: str | None,
    ) -> Served:
        settings = sampling(bundle.sources.is_toy, rule=bundle.model.rule)
        tokenizer = engine.tokenizer
        if tokenizer is not None and concept is not None and resident is not None:
            tokenizer = tokenizer.with_concept(concept.tokens)
        side = engine.features_side or bundle.size
        return Served(name, engine, concept, tokenizer, resident, run.facts, run.published, settings, side)

    def _evict(self, newest: Served) -> None:
        """Concepts beyond the limit leave, the one that was not asked for the longest first."""
        engine = newest.engine
        if len(engine.concepts) <= self._limits.concepts:
            return
        needed = self._in_use(engine) | {newest.resident}
        with self._lock:
            place = {name: number for number, name in enumerate(self._shared)}
        free = sorted((name for name in engine.concepts if name not in needed), key=lambda name: place.get(name, -1))
        for name in free[: len(engine.concepts) - self._limits.concepts]:
            engine.remove_concept(name)


def _is_name(name: str) -> bool:
    try:
        safe_name(name)
    except UserError:
        return False
    return True


def _is_run(path: Path) -> bool:
    return path.name != BASE and path.is_dir() and Run.learned_at(path) is not None


def _listed(name: str, path: Path) -> Listed:
    return Listed(name, path, int(path.stat().st_mtime))


def _has_weights(path: Path) -> bool:
    """Whether the run learned more than concept tokens."""
    learned = Run.learned_at(path)
    if learned is None or not (learned / "policy.json").is_file():
        return False
    about = read_json(learned / "policy.json")
    return not (isinstance(about, dict) and about.get("trainable") == "concept")


def _stamp(path: Path | None) -> float:
    """Changes when what the run learned is written anew."""
    learned = Run.learned_at(path) if path is not None else None
    if learned is None:
        return 0.0
    files = [learned / "policy.json", learned / "concept.json", learned / "concept" / "concept.json", learned]
    return max(file.stat().st_mtime for file in files if file.exists())

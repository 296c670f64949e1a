"""Weights of layers spread over ranks (FSDP2 on gloo): the run of one process, and checkpoints of all modes."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pyunictokens as uct
from pyunictokens.config.training import GrpoConfig
from pyunictokens.models import MagvitConfig, MagvitV2, ModelBundle
from pyunictokens.train import load_policy, read_metrics, reinforce
from pyunictokens.train.distributed.ranks import Ranks
from pyunictokens.train.distributed.sharded_layers import check_shares
from pyunictokens.train.microbatch import Microbatches
from pyunictokens.utils.errors import UserError
from pyunictokens.utils.signals import Stopped

from ..models import llama_tiny
from ..models.llama_tiny import write_checkpoint
from .ranks import together
from .test_reinforce_texts import PROMPTS, letters

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning", "ignore:.*os.fork")
NUMBERS = ("loss", "reward_mean", "kl", "ratio_mean", "clip_fraction")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llada"), "llada")


def config(**changes: Any) -> GrpoConfig:
    usual = {"trainable": "full", "steps": 2, "group_size": 2, "groups": 2, "lr": 1e-3, "beta": 0.05, "shard": "full"}
    usual |= {"max_new_tokens": 8, "block_length": 4, "text_steps": 4, "sample_every": 0, "checkpoint_every": 1}
    return GrpoConfig(**{**usual, "micro_rows": 1, **changes})


def learned(folder: Path, run: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    bundle = uct.models.load(folder, dtype)
    load_policy(bundle.model, run / "final")
    return {name: value.float() for name, value in bundle.model.named_parameters()}


def alike(one: Path, other: Path, steps: int = 2) -> None:
    mine, true = read_metrics(one), read_metrics(other)
    assert len(mine) == steps
    for a, b in zip(mine, true[:steps], strict=True):
        for key in NUMBERS:
            assert a[key] == pytest.approx(b[key], abs=1e-5), (a["step"], key)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


@pytest.mark.parametrize(
    ("trainable", "objective", "recompute", "gather"),
    [
        ("full", "unictask", False, "ahead"),
        pytest.param("lora", "unigrpo", True, "auto", marks=pytest.mark.slow),
        pytest.param("full", "coupled", True, "once", marks=pytest.mark.slow),
    ],
)
def test_spread_layers_learn_what_whole_ones_learn(
    folder: Path, tmp_path: Path, trainable: str, objective: str, recompute: bool, gather: str
) -> None:
    own = {"trainable": trainable, "objective": objective, "rollout_gather": gather}
    settings = config(**own, inner_epochs=2, checkpoint_layers=recompute)
    held_out = ["a cat in the snow ?"]
    reinforce(uct.models.load(folder), PROMPTS, letters, settings, tmp_path / "alone", held_out=held_out)

    def work(ranks: Ranks) -> list[str]:
        bundle = uct.models.load(folder)
        reinforce(bundle, PROMPTS, letters, settings, tmp_path / "two", ranks=ranks, held_out=held_out)
        return sorted({type(value).__name__ for value in bundle.model.parameters()})

    assert together(2, work, tmp_path / "results") == [["Parameter"]] * 2, "at the end the model is a plain one"
    alike(tmp_path / "two", tmp_path / "alone")
    mine, true = learned(folder, tmp_path / "two"), learned(folder, tmp_path / "alone")
    start = dict(uct.models.load(folder).model.named_parameters())
    moved = sum(float((true[name] - start[name]).abs().sum()) for name in true)
    apart = sum(float((true[name] - mine[name]).abs().sum()) for name in true)
    assert moved > 0 and apart < 0.02 * moved


def test_layers_are_spread_and_the_rest_is_not(folder: Path, tmp_path: Path) -> None:
    from pyunictokens.train.distributed.sharded_layers import ShardedLayers, local

    def work(ranks: Ranks) -> tuple[set[str], set[str], int, int, bool]:
        model = uct.models.load(folder).model
        ids = torch.tensor([[1, 5, 9]])
        before = model.model.encode(ids)  # type: ignore[operator, union-attr]
        layers = ShardedLayers(model, ranks)
        spread = {name for name, value in model.named_parameters() if type(value).__name__ == "DTensor"}
        rest = {name for name, _ in model.named_parameters()} - spread
        own = sum(local(value).numel() for name, value in model.named_parameters() if name in spread)
        total = sum(value.numel() for name, value in model.named_parameters() if name in spread)
        after = model.model.encode(ids)  # type: ignore[operator, union-attr]
        with layers.whole():
            plain = model.model.encode(ids)  # type: ignore[operator, union-attr]
        return spread, rest, own, total, torch.equal(before, after) and torch.equal(before, plain)

    for spread, rest, own, total, same in together(2, work, tmp_path / "results"):
        assert same and all(".blocks." in name for name in spread) and not any(".blocks." in name for name in rest)
        assert len(rest) == 3 and own <= 0.6 * total


def test_rollouts_gather_two_layers_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank makes three forward passes, the other one: both see the weights of all layers each time, two on their
    way while one runs, and nobody waits for ever."""
    import torch.distributed as dist

    from pyunictokens.models import llama_body
    from pyunictokens.train.distributed.sharded_layers import ShardedLayers

    monkeypatch.setattr(llama_tiny, "LAYERS", 5)
    place = write_checkpoint(tmp_path / "five", "llada")
    real, forward = dist.all_gather_into_tensor, llama_body.Block.forward
    gathers, seen = [0], list[int]()

    def counted(*given: Any, **named: Any) -> Any:
        gathers[0] += 1
        return real(*given, **named)

    def looking(self: llama_body.Block, *given: Any) -> Tensor:
        seen.append(gathers[0])
        return forward(self, *given)

    monkeypatch.setattr(dist, "all_gather_into_tensor", counted)

    def work(ranks: Ranks) -> tuple[bool, list[int], list[int], list[int]]:
        model = uct.models.load(place).model
        passes = 3 - 2 * ranks.rank
        ids = [torch.tensor([[1, 5 + number, 9]]) for number in range(passes)]
        with torch.no_grad():
            before = [model.model.encode(each) for each in ids]  # type: ignore[operator, union-attr]
            layers = ShardedLayers(model, ranks, ahead=True)
            monkeypatch.setattr(llama_body.Block, "forward", looking)
            gathers[0] = 0
            with layers.sampling():
                during = [model.model.encode(each) for each in ids]  # type: ignore[operator, union-attr]
                told = ranks.gather(passes)
                all_of_them = gathers[0]
                model.model.encode(ids[0])  # type: ignore[operator, union-attr]
        same = all(torch.equal(one, other) for one, other in zip(before, during, strict=True))
        return same, seen, told, [all_of_them, gathers[0]]

    first, second = together(2, work, tmp_path / "results")
    each = [3, 4, 5, 5, 5]
    assert first[1] == [done + 5 * number for number in range(4) for done in each]
    assert second[1] == [*each, *(15 + done for done in each)]
    for same, _, told, counts in (first, second):
        assert same and told == [3, 1] and counts == [15, 20]


def test_a_rollout_that_does_not_fit_ends_the_run() -> None:
    from pyunictokens.train.distributed.sharded_layers import _Passes

    passes = _Passes(lambda: None)
    passes.begin()
    passes.end()
    passes.begin()  # and memory runs out
    with pytest.raises(UserError, match=r"grpo.rollout_gather=ahead it cannot be split.*lower grpo.group_size"):
        passes.begin()


@pytest.mark.slow
def test_layers_in_the_hosts_memory_learn_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CPUs the host's memory is the device's: what can be seen here is the policy that FSDP2 is given, and that no
    number changes. The test of checkpoints goes on with it and without."""
    from torch.distributed.fsdp import CPUOffloadPolicy
    from torch.distributed.fsdp import fully_shard as real

    from pyunictokens.train.distributed import sharded_layers

    given: list[bool] = []

    def spied(module: torch.nn.Module, **how: Any) -> object:
        given.append(isinstance(how["offload_policy"], CPUOffloadPolicy))
        return real(module, **how)

    monkeypatch.setattr(sharded_layers, "fully_shard", spied)

    def work(ranks: Ranks) -> list[bool]:
        for name, offload in (("device", False), ("host", True)):
            bundle, settings = uct.models.load(folder, torch.bfloat16), config(offload=offload, dtype="bfloat16")
            reinforce(bundle, PROMPTS, letters, settings, tmp_path / name, ranks=ranks)
        return given

    assert together(2, work, tmp_path / "results") == [[False, False, True, True]] * 2
    alike(tmp_path / "host", tmp_path / "device")
    mine, true = (learned(folder, tmp_path / name, torch.bfloat16) for name in ("host", "device"))
    assert all(torch.equal(mine[name], true[name]) for name in true)


@pytest.mark.parametrize("first", ["full", pytest.param("alone", marks=pytest.mark.slow)])
def test_checkpoints_of_one_mode_are_resumed_by_others(folder: Path, tmp_path: Path, first: str) -> None:
    reinforce(uct.models.load(folder), PROMPTS, letters, config(shard="none", steps=3), tmp_path / "straight")

    def run(shard: str, ranks: Ranks | None, stop_after: int | None) -> None:
        done = [0]

        def progress(what: str, step: int, wanted: int, now: Any = None, /) -> None:
            done[0] = step

        settings = config(shard=shard, steps=3, offload=shard == "full")
        try:
            reinforce(
                uct.models.load(folder),
                PROMPTS,
                letters,
                settings,
                tmp_path / "run",
                ranks=ranks,
                resume=(tmp_path / "run").exists() and stop_after != 1,
                progress=progress,
                stop=lambda: stop_after is not None and done[0] + 1 >= stop_after,
            )
        except Stopped:
            assert stop_after is not None

    def on_two(shard: str, stop_after: int | None) -> None:
        found = together(2, lambda ranks: run(shard, ranks, stop_after), tmp_path / f"results{shard}{stop_after}")
        assert found == [None, None]

    if first == "alone":
        run("none", None, 1)
    else:
        on_two(first, 1)
    on_two("optimizer" if first == "full" else "full", 2)
    run("none", None, None)
    alike(tmp_path / "run", tmp_path / "straight", 3)


@pytest.mark.slow
def test_four_ranks_and_checkpoints_of_any_number_of_them(folder: Path, tmp_path: Path) -> None:
    """Four ranks, one, two and four again, in three modes, each from what the last one left: the run of one process."""
    reinforce(uct.models.load(folder), PROMPTS, letters, config(shard="none", steps=4), tmp_path / "straight")

    def run(shard: str, end: int, ranks: Ranks | None = None) -> int:
        settings, done, place = config(shard=shard, steps=4), [end - 1], tmp_path / "run"

        def progress(what: str, step: int, wanted: int, now: Any = None, /) -> None:
            done[0] = step

        def stop() -> bool:
            return done[0] + 1 >= end and end < 4

        bundle, told = uct.models.load(folder), {"ranks": ranks, "progress": progress, "stop": stop}
        with suppress(Stopped):
            reinforce(bundle, PROMPTS, letters, settings, place, resume=end > 1, **told)  # type: ignore[arg-type]
        return len(read_metrics(place))

    assert together(4, lambda ranks: run("full", 1, ranks), tmp_path / "4a", seconds=400) == [1] * 4
    alike(tmp_path / "run", tmp_path / "straight", 1)
    assert run("none", 2) == 2
    assert together(2, lambda ranks: run("full", 3, ranks), tmp_path / "2", seconds=400) == [3] * 2
    assert together(4, lambda ranks: run("optimizer", 4, ranks), tmp_path / "4b", seconds=400) == [4] * 4
    alike(tmp_path / "run", tmp_path / "straight", 4)
    mine, true = learned(folder, tmp_path / "run"), learned(folder, tmp_path / "straight")
    start = dict(uct.models.load(folder).model.named_parameters())
    moved = sum(float((true[name] - start[name]).abs().sum()) for name in true)
    apart = sum(float((true[name] - mine[name]).abs().sum()) for name in true)
    assert moved > 0 and apart < 0.02 * moved


@pytest.mark.slow
def test_half_precision_has_float32_masters(folder: Path, tmp_path: Path) -> None:
    def work(shard: str) -> None:
        def each(ranks: Ranks) -> None:
            bundle = uct.models.load(folder, torch.bfloat16)
            settings = config(shard=shard, dtype="bfloat16", lr=1e-2, beta=0.0)
            reinforce(bundle, PROMPTS, letters, settings, tmp_path / shard, ranks=ranks)

        assert together(2, each, tmp_path / f"results_{shard}") == [None, None]

    work("full")
    work("optimizer")
    one, two = read_metrics(tmp_path / "full"), read_metrics(tmp_path / "optimizer")
    assert one[0]["loss"] == pytest.approx(two[0]["loss"], abs=1e-2)
    assert one[0]["grad_norm"] == pytest.approx(two[0]["grad_norm"], rel=0.05)
    from pyunictokens.train.checkpoint.shards import read_whole

    state = read_whole(tmp_path / "full" / "checkpoints" / "step_000002" / "shards")
    masters = {name: value for name, value in state.items() if name.startswith("master.")}
    assert masters and all(value.dtype == torch.float32 for value in masters.values())
    rounded = learned(folder, tmp_path / "full", torch.bfloat16)
    for name, value in masters.items():
        assert torch.equal(value.bfloat16().float(), rounded[name.removeprefix("master.")]), name


def test_images_of_mmada(tmp_path: Path) -> None:
    place = write_checkpoint(tmp_path / "mmada", "mmada")
    torch.manual_seed(0)
    MagvitV2(MagvitConfig(8, (1, 1), (1, 1), (1, 1), (1, 1), 5, 4)).save_pretrained(place / "vq")

    def bright(prompts: list[str], images: Tensor) -> Tensor:
        return images.mean((1, 2, 3))

    def run(name: str, ranks: Ranks | None = None) -> None:
        bundle: ModelBundle = uct.models.load(place, vq=place / "vq")
        settings = replace(config(), timesteps=3, guidance_scale=2.0, token_scope="masked")
        reinforce(bundle, ["a red dog", "big cat"], bright, settings, tmp_path / name, ranks=ranks)

    run("alone")
    assert together(2, lambda ranks: run("two", ranks), tmp_path / "results") == [None, None]
    alike(tmp_path / "two", tmp_path / "alone")


def test_what_cannot_be_spread(folder: Path, tmp_path: Path) -> None:
    for groups, size, world in [(2, 3, 2), (4, 3, 2), (1, 8, 4), (2, 4, 4)]:
        check_shares(groups, size, 1, 1, world)
    with pytest.raises(UserError, match=r"set grpo.groups to a multiple of 2"):
        check_shares(1, 9, 1, 1, 2)
    with pytest.raises(UserError, match=r"set grpo.groups to a multiple of 4"):
        check_shares(3, 4, 1, 1, 4)
    with pytest.raises(UserError, match=r"set grpo.micro_rows and grpo.micro_timesteps"):
        check_shares(2, 2, 0, 1, 2)

    with pytest.raises(UserError, match=r"offload or rollout_gather=ahead with shard=optimizer: set shard=full"):
        config(shard="optimizer", offload=True)
    with pytest.raises(UserError, match=r"rollout_gather=ahead with shard=auto: set shard=full"):
        config(shard="auto", rollout_gather="ahead")
    with pytest.raises(UserError, match=r"grpo.offload=true on one rank: start several ranks with torchrun"):
        alone = config(offload=True)
        reinforce(uct.models.load(folder), PROMPTS, letters, alone, tmp_path / "alone")

    def full(rows: slice, steps: slice) -> None:
        raise torch.OutOfMemoryError

    with pytest.raises(UserError, match=r"a microbatch of 4 packed rows does not fit .* all ranks need equal ones"):
        Microbatches(4, 1, 4, fixed=True).run(4, 1, full, torch.device("cpu"))

    def work(ranks: Ranks) -> str:
        from pyunictokens.toy.model import load_toy
        from pyunictokens.train.distributed.sharded_layers import ShardedLayers

        try:
            ShardedLayers(load_toy().model, ranks)
        except UserError as error:
            return str(error)
        return ""

    for said in together(2, work, tmp_path / "results"):
        assert "the layers of show-o cannot be spread: use grpo.shard=optimizer" in said

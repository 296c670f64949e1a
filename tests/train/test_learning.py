"""Training learns, and a break of what learning rests on is noticed: a few dozen steps on random weights.

Each of these was broken on purpose, and `test_learns` fails for it (`test_each_break_is_noticed` breaks them again):

    sign        the gradient points the other way
    mean        the group's mean is not subtracted from rewards that are all far above zero
    old         the old log-probs are those of other tokens, so that ratios do not begin at 1
    mask        the update looks at the tokens that were known already
    reference   the divergence is taken from the policy itself
    noise       all samples of a group are drawn with one noise key
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pyunictokens import ops
from pyunictokens.config.training import DsogConfig, HeldOutConfig
from pyunictokens.rollout.engine import RolloutEngine
from pyunictokens.train import collector, read_metrics, reinforce
from pyunictokens.train.objective import Objective
from pyunictokens.train.policy import Policy
from tests.train.test_reinforce import parts
from tests.train.world import grpo_config

PROMPTS = ["a red ball", "a blue dog", "a toy", "the basket"]
GAIN, KEPT = 0.03, 0.5


def bright(images: Tensor) -> Tensor:
    """Far above zero for every image, so that what is not subtracted drowns what differs."""
    return images.mean((1, 2, 3)) + 5


def learn(folder: Path, **changes: Any) -> tuple[float, list[dict[str, Any]]]:
    """(gain of held-out reward, lines of the log)."""
    chosen = grpo_config(
        trainable="full", steps=16, groups=2, group_size=8, lr=3e-3, timesteps=4, guidance_scale=0.0, beta=0.0,
        token_scope="newly_unmasked", schedule="constant", micro_rows=16, micro_timesteps=4, checkpoint_every=0,
        dsog=DsogConfig(enabled=False), held_out=HeldOutConfig(every=1000, images=8, patience=0),
    )  # fmt: skip
    chosen = type(chosen)(**{**vars(chosen), **changes})
    result = reinforce(parts(), PROMPTS, bright, chosen, folder, held_out=["a small dog", "a blue basket"])
    first, last = result.held_out[0], result.held_out[-1]
    return last.mean("reward") - first.mean("reward"), read_metrics(folder)


def check(folder: Path) -> None:
    """What holds of training that works."""
    gain, lines = learn(folder / "free")
    assert gain > GAIN, f"held-out reward rose by {gain:.3f}"
    assert all(abs(line["ratio_mean"] - 1) < 1e-3 for line in lines), "the first epoch's ratios are 1"
    assert min(line["within_group_std"] for line in lines[:4]) > 1e-3, "samples of a group differ"
    held, kept = learn(folder / "held", beta=1.0)
    assert held < KEPT * gain, f"the reference holds the policy: {held:.3f} against {gain:.3f}"
    assert kept[-1]["kl"] > 0


def test_learns(tmp_path: Path) -> None:
    check(tmp_path)


def _sign(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Objective.advantages
    monkeypatch.setattr(Objective, "advantages", lambda self, rewards, groups: -own(self, rewards, groups))


def _mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Objective, "advantages", lambda self, rewards, groups: rewards.clone())


def _old(monkeypatch: pytest.MonkeyPatch) -> None:
    own = collector.ImageTrajectories.of

    def of(*given: Any) -> Any:
        made = own(*given)
        made.old_logp_RTN = made.old_logp_RTN.roll(1, dims=-1)
        return made

    monkeypatch.setattr(collector.ImageTrajectories, "of", staticmethod(of))


def _mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "token_mask", lambda inputs, scope: inputs >= 0)


def _reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Policy, "reference", lambda self: torch.no_grad())


def _noise(monkeypatch: pytest.MonkeyPatch) -> None:
    own = RolloutEngine.generate_images

    def generate_images(self: RolloutEngine, *given: Any, **named: Any) -> Any:
        if named.get("seed") == 0:  # training's
            named["sample_ids"] = [named["sample_ids"][0]] * len(named["sample_ids"])
        return own(self, *given, **named)

    monkeypatch.setattr(RolloutEngine, "generate_images", generate_images)


BREAKS = {"sign": _sign, "mean": _mean, "old": _old, "mask": _mask, "reference": _reference, "noise": _noise}


QUICK = ("sign", "reference")
"""One break of each half of `check`; the others are tried by `make slow`."""


@pytest.mark.parametrize(
    "what", [what if what in QUICK else pytest.param(what, marks=pytest.mark.slow) for what in BREAKS]
)
def test_each_break_is_noticed(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    BREAKS[what](monkeypatch)
    with pytest.raises(AssertionError):
        check(tmp_path)


def test_the_breaks_are_those_of_the_docstring() -> None:
    assert all(f"\n    {name} " in str(__doc__) for name in BREAKS)

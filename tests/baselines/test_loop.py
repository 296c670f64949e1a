"""The loop that baselines learn in: AdamW's steps, a stop and a resume that change nothing, steps without numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pyunictokens.baselines.base import BaselineSettings, Job
from pyunictokens.baselines.loop import CHECKPOINT, batch_of, finished, learn
from pyunictokens.data.concept import Concept
from pyunictokens.utils.errors import UserError
from pyunictokens.utils.signals import Stopped


def job(folder: Path, **more: object) -> Job[BaselineSettings]:
    folder.mkdir(exist_ok=True)
    made = Job(Concept("bo", folder), folder, BaselineSettings(seed=3, save_every=2))
    return replace(made, **more)  # type: ignore[arg-type]


def losses(parameter: nn.Parameter):  # type: ignore[no-untyped-def]
    """Two parts a step, of numbers that the generator draws."""

    def of(step: int, generator: torch.Generator) -> list[Tensor]:
        target = torch.randn(5, generator=generator)
        return [(parameter - target).square().sum() / 2, parameter.abs().sum() * 0.1 * (step + 1)]

    return of


def test_steps_are_adamws_on_the_sum_of_the_parts(tmp_path: Path) -> None:
    mine, plain = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    seen: list[Tensor] = []
    of = losses(mine)

    def noted(step: int, generator: torch.Generator) -> list[Tensor]:
        seen.append(generator.get_state())
        return of(step, generator)

    learn(job(tmp_path / "a"), "part", {"row": mine}, noted, steps=4, lr=0.1, weight_decay=0.01)
    adam = torch.optim.AdamW([plain], lr=0.1, weight_decay=0.01)
    of_plain = losses(plain)
    for step in range(4):
        generator = torch.Generator()
        generator.set_state(seen[step])
        adam.zero_grad()
        sum(of_plain(step, generator)).backward()  # type: ignore[union-attr]
        adam.step()
    torch.testing.assert_close(mine, plain, rtol=0, atol=1e-6)
    lines = [json.loads(line) for line in (tmp_path / "a" / "part.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3] and lines[0]["loss"] != lines[1]["loss"]


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_stop_and_a_resume_change_nothing(at: int, tmp_path: Path) -> None:
    whole, parts = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    learn(job(tmp_path / "a"), "part", {"row": whole}, losses(whole), steps=6, lr=0.1, schedule="cosine")
    asked = iter([False] * (at - 1) + [True])
    with pytest.raises(Stopped, match=f"after step {at} of 6"):
        learn(
            job(tmp_path / "b", stop=lambda: next(asked)),
            "part",
            {"row": parts},
            losses(parts),
            steps=6,
            lr=0.1,
            schedule="cosine",
        )
    fresh = nn.Parameter(torch.full((5,), 9.0))
    again = job(tmp_path / "b", resume=True)
    learn(again, "part", {"row": fresh}, losses(fresh), steps=6, lr=0.1, schedule="cosine")
    assert torch.equal(fresh, whole)
    assert (tmp_path / "a" / "part.jsonl").read_text() == (tmp_path / "b" / "part.jsonl").read_text()
    other = nn.Parameter(torch.ones(5))
    learn(again, "another", {"row": other}, losses(other), steps=1, lr=0.1)  # not of this part: from the beginning
    assert (tmp_path / "b" / "another.jsonl").read_text().count("\n") == 1
    finished(again)
    assert not (tmp_path / "b" / CHECKPOINT).exists()


def test_steps_that_are_not_finite_are_left_out_and_then_end_it(tmp_path: Path) -> None:
    row = nn.Parameter(torch.ones(2))

    def bad(step: int, generator: torch.Generator) -> list[Tensor]:
        return [row.sum() * (float("nan") if step != 1 else 1.0)]

    with pytest.raises(UserError, match="2 steps in a row"):
        learn(job(tmp_path / "a"), "part", {"row": row}, bad, steps=9, lr=0.5, max_bad_steps=2)
    assert torch.allclose(row, torch.full((2,), 0.5))  # step 1 alone was learned from
    skipped = [json.loads(line).get("skipped") for line in (tmp_path / "a" / "part.jsonl").read_text().splitlines()]
    assert skipped == ["loss nan", None, "loss nan", "loss nan"]


def test_a_damaged_checkpoint_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = nn.Parameter(torch.ones(5))
    learn(job(tmp_path / "a"), "part", {"row": row}, losses(row), steps=4, lr=0.1)
    (tmp_path / "a" / CHECKPOINT).write_bytes(b"nothing")
    again = nn.Parameter(torch.ones(5))
    learn(job(tmp_path / "a", resume=True), "part", {"row": again}, losses(again), steps=4, lr=0.1)
    assert torch.equal(again, row) and "is begun anew" in caplog.text


def test_batches_hold_every_item_once_an_epoch() -> None:
    for size in (1, 2, 3, 7):
        steps = -(-7 // size)
        for epoch in range(3):
            seen = [i for step in range(steps) for i in batch_of(7, size, 5, epoch * steps + step)]
            assert sorted(seen) == list(range(7))
    assert batch_of(7, 7, 5, 0) != batch_of(7, 7, 5, 1) and batch_of(7, 7, 5, 0) != batch_of(7, 7, 6, 0)

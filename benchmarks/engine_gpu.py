"""The rollout engine and a whole GRPO step at the full size of Show-o on one GPU, beside the published loops.

    python -m benchmarks.engine_gpu                        # random weights of 1.45 B, 512², T 50, at most 9 minutes
    python -m benchmarks.engine_gpu --smoke --device cpu   # every section on tiny shapes: proves that it runs

Weights are random and built on the device: time does not depend on them. Slow sides are timed over a few steps and
scaled to all, which the report says of each. Sections are saved as they end; one that fails, or for which no time is
left, is listed with its reason. The report goes to benchmarks/results/engine-<machine>.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import shlex
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TypeVar
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks import levers
from benchmarks.baselines import showo_plain
from benchmarks.engine_report import EngineReport, Number
from benchmarks.engine_sizes import FULL, SMOKE, Sizes, random_model
from benchmarks.machine import commit
from benchmarks.ops import clock
from benchmarks.ops.run import Settings, default_file, machine, versions
from pyunictokens import MASK, RolloutEngine
from pyunictokens.models import ConceptTokens, MagvitV2, Showo
from pyunictokens.models.showo import compiled
from pyunictokens.models.showo import costs as cost
from pyunictokens.models.showo.kernels import attention_way
from pyunictokens.rollout import Dsog, DsogThreshold
from pyunictokens.rollout.cuda_graphs.capture import GraphPool
from pyunictokens.rollout.cuda_graphs.device_step import DeviceLoop, GuidedHidden, StepState, image_head
from pyunictokens.rollout.sampler import LoopSettings
from pyunictokens.rollout.types import ImageRollout, TextRollout
from pyunictokens.train.optimizer import Optimizer
from pyunictokens.train.policy import Policy
from pyunictokens.train.trajectories import AnswerTrajectories, ImageTrajectories
from pyunictokens.train.update import LossSettings, MicrobatchSizes, answer_logprobs, image_logprobs, streamed_backward
from pyunictokens.utils.errors import UserError

SECTIONS = ("images", "batched", "published", "image", "grpo", "answers", "levers", "small")
"""What can be asked for by name, in order of weight."""

T = TypeVar("T")


class Bench:
    """One run into one report."""

    def __init__(
        self,
        sizes: Sizes,
        device: str,
        budget: float,
        out: Path | None,
        smoke: bool,
        only: tuple[str, ...] = SECTIONS,
        resume: bool = False,
    ):
        self.s, self.device, self.budget, self.start = sizes, device, budget, time.monotonic()
        self.only, self.lost = only, ""
        self.dtype = torch.bfloat16
        about = machine(Settings(device=device, smoke=smoke))
        shown = {"codes": sizes.codes, "T": sizes.steps, "G": sizes.group, "guidance": sizes.guidance}
        self.report = EngineReport(
            machine=about,
            versions=versions(),
            commit=commit(),
            command=shlex.join(["python", "-m", "benchmarks.engine_gpu", *sys.argv[1:]]),
            date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            sizes={**shown, "parameters": cost.parameters(sizes.config)},
        )
        usual = default_file(about)
        self.out = out or usual.with_name(usual.name.replace("ops-", "engine-", 1))
        if resume and self.out.exists():
            before = EngineReport.load(self.out)
            self.report.numbers, self.report.absences = before.numbers, before.absences
            self.report.checks, self.report.done = before.checks, before.done
        self.model: Showo | None = None
        generator = torch.Generator().manual_seed(1)
        limit = sizes.config.llm_vocab_size - 2
        self.prompt = torch.randint(0, limit, (sizes.prompt,), generator=generator).tolist()
        self.question = torch.randint(0, limit, (sizes.question,), generator=generator).tolist()

    # --- taking numbers --------------------------------------------------------------------------------------------

    def all(self) -> EngineReport:
        """Every section in order of weight; the report is saved after each. One that fails leaves its reason."""
        first = clock.ceilings(self.device, self.dtype, self.report.machine.smoke)
        self.report.rates = clock.rates(first, first, self.dtype)
        self.model = random_model(self.s.config, self.device, self.dtype)
        sections: list[tuple[str, str, Callable[[], None], float]] = [
            ("images", "images", self.images, 45),
            ("batched", "images: batched bfloat16", self.batched, 12),
            ("published", "images: published", self.published_images, 25),
            ("image", "image", lambda: self.one_image("image", self.s.grid), 20),
            *[
                ("grpo", f"grpo T={steps}", lambda steps=steps: self.grpo(steps), 25 + 2 * steps)
                for steps in self.s.grpo_steps
            ],
            ("answers", "answers", self.answers, 30),
            *[("levers", f"lever {each.key}", partial(self.lever, each), each.seconds) for each in levers.LEVERS],
            ("small", "small image", lambda: self.one_image("small image", self.s.small_grid), 15),
        ]
        for kind, name, section, seconds in sections:
            if kind not in self.only or name in self.report.done:
                continue
            if (left := self.left()) < seconds:
                self.report.absences[name] = f"{left:.0f} s of {self.budget:.0f} were left, it wants {seconds:.0f}"
                continue
            self.report.absences.pop(name, None)
            self.report.done.append(name)
            self.report.save(self.out)  # who resumes does not meet this section again, whatever it does to the process
            try:
                section()
            except Exception as error:
                self.report.absences[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:300]
                print(f"!!! {name} FAILED: {self.report.absences[name]}", flush=True)
            self.tidy()
            self.report.save(self.out)
            if self.lost:
                print(f"the device is lost to this process ({self.lost}): run again with --resume", flush=True)
                return self.report
        last = clock.ceilings(self.device, self.dtype, self.report.machine.smoke)
        self.report.rates = clock.rates(first, last, self.dtype)
        self.report.save(self.out)
        return self.report

    def tidy(self) -> None:
        """Give cached memory back, and find out whether the device still answers."""
        gc.collect()
        if self.device == "cpu":
            return
        try:
            torch.cuda.empty_cache()
        except Exception as error:  # torch's allocator after a failed capture: numbers can still be taken
            print(f"empty_cache: {error}"[:300], flush=True)
        try:
            torch.cuda.synchronize()
        except Exception as error:
            self.lost = str(error).splitlines()[0][:160]

    def left(self) -> float:
        """Seconds of the budget that are not spent."""
        return self.budget - (time.monotonic() - self.start)

    def time(self, call: Callable[[], object], rounds: int = 0) -> tuple[float, int, int | None]:
        """(median seconds, rounds, most bytes held meanwhile; None on a CPU), after one call that is not timed."""
        rounds = rounds or self.s.rounds
        if self.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        call()
        clock.synchronize(self.device)
        middle = statistics.median(clock.seconds(call, self.device) for _ in range(rounds))
        return middle, rounds, None if self.device == "cpu" else torch.cuda.max_memory_allocated()

    def note(self, number: Number) -> None:
        self.report.numbers.append(number)
        self.report.save(self.out)
        print(f"{number.work:12} {number.side:18} {number.rate:10.4g} {number.unit}/s  {number.note}", flush=True)

    # --- images ----------------------------------------------------------------------------------------------------

    def loop(
        self, rows: int, grid: tuple[int, int], mode: str, pool: GraphPool | None, steps: int = 0, head: str = "auto"
    ) -> DeviceLoop:
        """A bucket of `rows` images of one prompt."""
        assert self.model is not None
        s, count = self.s, grid[0] * grid[1]
        prompts = self.model.prefill([self.model.prompt_ids(text) for text in (self.prompt, [])])
        hidden = GuidedHidden(self.model, prompts, [0] * rows, s.guidance, count)
        settings = LoopSettings(steps or s.steps, s.guidance, 1.0, "cosine", 0, True, rows)
        state = StepState.make(self.model, rows, count, settings)
        return DeviceLoop(hidden, image_head(self.model, head), state, 0, mode=mode, pool=pool)  # type: ignore[arg-type]

    @torch.no_grad()
    def modes(self, work: str, rows: int, grid: tuple[int, int]) -> None:
        """The same images by each way to run the steps."""
        s, count = self.s, grid[0] * grid[1]
        pool = GraphPool(torch.device("cuda", torch.cuda.current_device())) if self.device != "cpu" else None
        flops = s.steps * cost.image_step(s.config, rows, s.prompt + 3, count, s.guidance > 0).flops
        drawn: dict[str, Tensor] = {}
        for mode in ("loop", "eager", "replay"):  # the one that everybody gets comes first
            if drawn and self.left() < 25:
                self.report.absences[f"{work}: {mode}"] = f"{self.left():.0f} s of {self.budget:.0f} were left"
                continue
            try:
                loop = self.loop(rows, grid, mode, pool)
            except UserError as error:
                self.report.absences[f"{work}: {mode}"] = str(error)
                continue
            known = torch.full((rows, count), MASK, device=self.device)

            def draw(loop: DeviceLoop = loop, known: Tensor = known) -> None:
                loop.state.start(range(rows), known, list(range(rows)), s.steps, urgent=False)
                loop.run()

            seconds, rounds, peak = self.time(draw)
            assert loop.state.picked is not None
            drawn[mode] = loop.state.picked.clone()
            note = f"{loop.steps.report()}; attention: {attention_way(torch.device(self.device))[0]}"
            self.note(Number(work, mode, seconds, rounds, rows, "images", flops, peak, note))
            loop.close()
        for mode, picked in drawn.items():
            if "eager" in drawn:
                self.report.checks[f"{work}: {mode}"] = float((picked == drawn["eager"]).float().mean())

    def images(self) -> None:
        self.modes("images", self.s.group, self.s.grid)

    def one_image(self, work: str, grid: tuple[int, int]) -> None:
        self.modes(work, 1, grid)

    @torch.no_grad()
    def plain(self, side: str, model: Showo, rows: int, itemsize: int) -> None:
        """The published loop, a few steps timed and scaled to all."""
        s = self.s
        known = torch.full((rows, s.codes), MASK, device=self.device)

        def draw() -> object:
            return showo_plain.generate_images(
                model,
                [self.prompt] * rows,
                known,
                max_text=s.config.max_text,
                steps=s.few_steps,
                guidance_scale=s.guidance,
            )

        seconds, rounds, peak = self.time(draw)
        flops = (
            s.steps * cost.plain_image_step(s.config, rows, s.config.max_text, s.codes, s.guidance > 0, itemsize).flops
        )
        scale = s.steps / s.few_steps
        note = f"{s.few_steps} steps timed, scaled to {s.steps}"
        self.note(Number("images", side, seconds * scale, rounds, rows, "images", flops, peak, note))

    def batched(self) -> None:
        assert self.model is not None
        self.plain("batched bfloat16", self.model, self.s.group, 2)

    def exact_model(self) -> Showo:
        return random_model(self.s.config, self.device, torch.float32)

    def published_images(self) -> None:
        model = self.exact_model()
        before = torch.backends.cuda.matmul.allow_tf32
        try:
            torch.backends.cuda.matmul.allow_tf32 = False
            self.plain("published", model, 1, 4)
            if self.device != "cpu":
                torch.backends.cuda.matmul.allow_tf32 = True
                self.plain("published, TF32", model, 1, 4)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    # --- levers ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def lever(self, lever: levers.Lever) -> None:
        """A step of the group with a lever and without it, captured where that can be; the sides take turns."""
        assert self.model is not None
        s, model, name = self.s, self.model, f"lever {lever.key}"
        if reason := lever.objection(model):
            self.report.absences[name] = f"{levers.MISSING}: {reason}"
            print(f"{name}: {self.report.absences[name]}", flush=True)
            return
        known = torch.full((s.group, s.codes), MASK, device=self.device)
        pool = GraphPool(torch.device("cuda", torch.cuda.current_device())) if self.device != "cpu" else None
        flops = s.lever_steps * cost.image_step(s.config, s.group, s.prompt + 3, s.codes, s.guidance > 0).flops
        ways = {"with": lever.on, "without": lever.off}
        loops: dict[str, DeviceLoop] = {}
        samples: dict[str, list[float]] = {side: [] for side in ways}

        def draw(side: str) -> None:
            loops[side].state.start(range(s.group), known, list(range(s.group)), s.lever_steps, urgent=False)
            loops[side].run()

        try:
            for (side, way), head in zip(ways.items(), lever.heads, strict=True):
                with self.smokes(), way(model):
                    loops[side] = self.loop(s.group, s.grid, "auto", pool, s.lever_steps, head)
                    draw(side)
            for turn in range(s.lever_rounds):
                for side in ways if turn % 2 == 0 else reversed(ways):
                    with self.smokes(), ways[side](model):
                        clock.synchronize(self.device)
                        samples[side].append(clock.seconds(partial(draw, side), self.device))
            for side, taken in samples.items():
                seconds, note = statistics.median(taken), f"{lever.text}; {loops[side].steps.report()}"
                self.note(Number(name, side, seconds, len(taken), s.lever_steps, "steps", flops, None, note))
        finally:
            for loop in loops.values():
                loop.close()

    def smokes(self) -> AbstractContextManager[object]:
        """Tiny shapes prove that a section runs: torch.compile's code generator, minutes of a compiler, is left out."""
        return patch.object(compiled, "BACKEND", "eager") if self.report.machine.smoke else nullcontext()

    # --- answers ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def answers(self) -> None:
        assert self.model is not None
        s = self.s
        codes = torch.randint(0, s.config.codebook_size, (1, s.codes), device=self.device)
        engine, context = RolloutEngine(self.model), s.codes + 3 + s.question

        def ours() -> object:
            return engine.generate_text(codes, [self.question], samples=s.group, max_new_tokens=s.tokens)

        seconds, rounds, peak = self.time(ours)
        flops = cost.answers(s.config, s.group, context, s.tokens).flops
        self.note(Number("answers", "engine", seconds, rounds, s.group * s.tokens, "tokens", flops, peak))
        model = self.exact_model()

        def plain() -> object:
            return showo_plain.generate_text(model, codes.cpu(), [self.question], max_new_tokens=s.few_tokens)

        seconds, rounds, peak = self.time(plain)
        note = f"one answer at a time, float32; {s.few_tokens} tokens timed, scaled to {s.group} × {s.tokens}"
        flops = cost.plain_answers(s.config, s.group, context, s.tokens).flops
        scale = s.group * s.tokens / s.few_tokens
        self.note(
            Number("answers", "published", seconds * scale, rounds, s.group * s.tokens, "tokens", flops, peak, note)
        )

    # --- a GRPO step -----------------------------------------------------------------------------------------------

    def grpo(self, steps: int) -> None:
        """Answers, images with previews, reference, update of all weights, optimizer; time by part, peak of it all."""
        assert self.model is not None
        s, model, work = self.s, self.model, f"grpo T={steps}"
        torch.manual_seed(0)
        with torch.device(self.device):
            vq = MagvitV2(s.vq).requires_grad_(False).eval()
            concept = ConceptTokens("bo", s.config.hidden_size, 16, 8)
        model.attach(concept)
        engine = RolloutEngine(model, vq)
        codes = torch.randint(0, s.config.codebook_size, (1, s.codes), device=self.device)
        taken: dict[str, float] = {}

        def timed(name: str, call: Callable[[], T]) -> T:
            box: list[T] = []
            taken[name] = taken.get(name, 0.0) + clock.seconds(lambda: box.append(call()), self.device)
            return box[0]

        def score(pixels: Tensor, _: Tensor) -> Tensor:
            return torch.rand(len(pixels), generator=torch.Generator().manual_seed(len(taken)))

        with tempfile.TemporaryDirectory() as folder:
            policy = Policy(model, "full", reference_file=Path(folder) / "reference.safetensors")
            optimizer = Optimizer(policy.named_parameters(), lr=1e-6, max_grad_norm=1.0)
            sizes, settings = MicrobatchSizes(), LossSettings(micro_rows=0, micro_timesteps=0)

            def answer() -> TextRollout:
                return engine.generate_text(codes, [self.question], samples=s.group, max_new_tokens=s.tokens)

            def draw(texts: TextRollout) -> ImageRollout:
                # Two of the prompt's ids are the answer's, so that rows have prompts of their own.
                ends = (texts.tokens[:, :2] % s.config.llm_vocab_size).tolist()
                prompts = [[*self.prompt[:-2], *end] for end in ends]
                dsog = Dsog(DsogThreshold(0.75), score, max_candidates=8)
                return engine.generate_images(prompts, steps=steps, guidance_scale=s.guidance, dsog=dsog)

            def whole() -> None:
                with warnings.catch_warnings(), torch.no_grad():
                    warnings.simplefilter("ignore")  # rows that are filled are no news here
                    texts = timed("answers", answer)
                    images = timed("images", lambda: draw(texts))
                update, answers = _trajectories(model, images, texts)
                with policy.reference():
                    update.ref_logp_RTN = timed("reference", lambda: image_logprobs(model, update, 0, 0, sizes))
                    answers.ref_logp_RL = answer_logprobs(model, answers)
                advantages = torch.linspace(-1, 1, s.group, device=self.device)
                timed("update", lambda: streamed_backward(model, advantages, settings, update, answers, sizes))
                timed("optimizer", lambda: optimizer.step(1e-6))
                optimizer.zero_grad()

            try:
                whole()  # finds out sizes, compiles kernels, makes the optimizer's state
                taken.clear()
                if self.device != "cpu":
                    torch.cuda.reset_peak_memory_stats()
                whole()
                peak = None if self.device == "cpu" else torch.cuda.max_memory_allocated()
            finally:
                optimizer.release()
                model.requires_grad_(False)
                model.detach()
                model.checkpoint_layers = False
        layers = s.config.num_hidden_layers
        note = sizes.images.report(layers) if sizes.images else ""
        whole_cost = cost.update(s.config, s.group, steps, s.prompt + 3, s.codes).flops
        scoring = cost.reference(s.config, s.group, steps, s.prompt + 3, s.codes).flops
        flops = {"update": whole_cost, "reference": scoring}
        for name, seconds in taken.items():
            words = note if name == "update" else ""
            self.note(Number(work, name, seconds, 1, 1, "steps", flops.get(name, 0.0), None, words))
        self.note(Number(work, "whole step", sum(taken.values()), 1, 1, "steps", 0.0, peak, "all weights learn"))


def _trajectories(
    model: Showo, images: ImageRollout, texts: TextRollout
) -> tuple[ImageTrajectories, AnswerTrajectories]:
    assert texts.image_codes is not None
    return (
        ImageTrajectories.of(model, images),
        AnswerTrajectories(texts.image_codes[0], texts.question_ids[0], texts.tokens, texts.logp),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes: proves that every section runs")
    parser.add_argument("--budget", type=float, default=500.0, help="seconds after which no section begins")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    parser.add_argument(
        "--grpo-steps", nargs="+", type=int, metavar="T", help="timesteps of the GRPO steps (default 10 50)"
    )
    parser.add_argument("--resume", action="store_true", help="go on behind the last section of the result file")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.device != "cpu" and not torch.cuda.is_available():
        sys.exit("torch finds no GPU here; --smoke --device cpu proves that every section runs")
    clock.take(options.device)
    sizes = SMOKE if options.smoke else FULL
    if options.grpo_steps:
        sizes = dataclasses.replace(sizes, grpo_steps=tuple(options.grpo_steps))
    bench = Bench(
        sizes, options.device, options.budget, options.out, options.smoke, tuple(options.only), options.resume
    )
    report = bench.all()
    for section, reason in report.absences.items():
        print(f"not measured: {section}: {reason}")
    print(f"{bench.out} ({dataclasses.asdict(report)['date']})")
    if bench.lost:
        sys.exit(3)


if __name__ == "__main__":
    main()

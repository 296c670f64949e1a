"""Models other than Show-o against the loops they were published with: aMUSEd's pipeline and LLaDA's generation.

    python -m benchmarks.models                           # writes benchmarks/results/models-<cores>core.json
    python -m benchmarks.models --only text --rounds 3

images  RolloutEngine.generate_images  and diffusers' AmusedPipeline: one prompt, a group, guidance, pixels
texts   RolloutEngine.write            and the published loop: whole sequence and logits of all positions in every step

Both sides have the same random weights and numbers of steps, and take turns round by round in one process after a
warm-up; quoted is the ratio of medians of the process's own CPU seconds, which other work on the machine disturbs
little, with the ratios of single rounds as spread. Greedy texts of both sides must be
equal, or nothing is timed; that both draw the same images from the same noise is tested in tests/models/test_amused.py.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import pyunictokens as uct
from benchmarks.machine import cores, results
from benchmarks.rollout_cases import Case
from benchmarks.run_cpu import machine, measure
from pyunictokens.models.llada import LlamaWriter, read_words
from pyunictokens.models.llama_body import Body, BodyConfig
from pyunictokens.utils.files import write_json
from tests.models.amused_tiny import write_pipeline
from tests.models.llama_tiny import write_tokenizer

PROMPT = "a photo of a red dog"


@dataclass(frozen=True)
class ImageSizes:
    group: int = 8
    steps: int = 12
    guidance_scale: float = 10.0
    side: int = 8
    """Codes along one side."""
    codebook: int = 256
    places: int = 77
    """Text positions."""
    width: int = 128
    layers: int = 4


@dataclass(frozen=True)
class TextSizes:
    group: int = 8
    prompt: int = 32
    new_tokens: int = 64
    block: int = 32
    steps: int = 16
    vocabulary: int = 512
    """With this width and depth the head has LLaDA-8B's share of the weights: one part in fourteen."""
    width: int = 128
    layers: int = 4
    temperature: float = 1.0


def images_case(sizes: ImageSizes, folder: Path) -> Case:
    """One prompt's group of guided images with their pixels."""
    from diffusers.pipelines.deprecated.amused.pipeline_amused import AmusedPipeline

    pipeline = write_pipeline(
        folder,
        halved=False,
        codes=sizes.codebook,
        side=sizes.side,
        places=sizes.places,
        hidden_size=sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=4,
        intermediate_size=3 * sizes.width,
        in_channels=sizes.width,
        block_out_channels=sizes.width,
        num_res_blocks=1,
    )
    engine = uct.RolloutEngine.of(uct.models.load(pipeline))
    plain: Any = AmusedPipeline.from_pretrained(pipeline)
    plain.set_progress_bar_config(disable=True)

    def ours() -> object:
        return engine.generate_images(
            PROMPT, samples=sizes.group, steps=sizes.steps, guidance_scale=sizes.guidance_scale, record=False
        )

    def theirs() -> object:
        return plain(
            PROMPT,
            num_images_per_prompt=sizes.group,
            num_inference_steps=sizes.steps,
            guidance_scale=sizes.guidance_scale,
            output_type="pt",
        )

    return Case("images", "diffusers' AmusedPipeline", ours, theirs, "group of images", asdict(sizes))


def writer(sizes: TextSizes, folder: Path) -> LlamaWriter:
    """A random LLaDA. Its texts seldom end before their time: neither side gains by that."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    torch.manual_seed(0)
    body = Body(
        BodyConfig(
            vocab_size=sizes.vocabulary,
            d_model=sizes.width,
            n_heads=4,
            n_kv_heads=4,
            n_layers=sizes.layers,
            mlp_hidden_size=3 * sizes.width,
            max_sequence_length=sizes.prompt + sizes.new_tokens,
            mask_token_id=3,
            eos_token_id=2,
        )
    )
    with torch.no_grad():
        body.head().mul_(3.0)
    return LlamaWriter(body.requires_grad_(False).eval(), read_words(folder))


@torch.no_grad()
def published_loop(model: LlamaWriter, prompt: list[int], sizes: TextSizes, rows: int, temperature: float) -> Tensor:
    """int64 [rows, new tokens]: a block after the other; every step computes the whole sequence and logits of all
    positions, samples all of them, and keeps the likeliest unknown ones of the block. Noise in float64."""
    ids = torch.full((rows, len(prompt) + sizes.new_tokens), model.mask_id, dtype=torch.int64)
    ids[:, : len(prompt)] = torch.tensor(prompt)
    blocks = sizes.new_tokens // sizes.block
    for block in range(blocks):
        end = len(prompt) + (block + 1) * sizes.block
        steps = sizes.steps // blocks
        for step in range(steps):
            unknown = ids == model.mask_id
            logits = F.linear(model.model.encode(ids), model.model.head())
            noisy = logits
            if temperature > 0:
                exponential = -torch.rand_like(logits, dtype=torch.float64).log()
                noisy = logits.double().exp() / exponential**temperature
            tokens = noisy.argmax(-1)
            sure = logits.double().softmax(-1).gather(-1, tokens[..., None])[..., 0]
            sure[:, end:] = -torch.inf
            sure = sure.masked_fill(~unknown, -torch.inf)
            share = sizes.block // steps + int(step < sizes.block % steps)
            for row in range(rows):
                kept = sure[row].topk(share).indices
                ids[row, kept] = tokens[row, kept]
    return ids[:, len(prompt) :]


def texts_case(sizes: TextSizes, folder: Path) -> Case:
    """One prompt's group of texts."""
    model = writer(sizes, folder)
    engine = uct.RolloutEngine(model)
    prompt = torch.randint(4, sizes.vocabulary, (sizes.prompt,), generator=torch.Generator().manual_seed(1)).tolist()

    def write(samples: int, temperature: float) -> Tensor:
        return engine.write(
            [prompt],
            samples=samples,
            max_new_tokens=sizes.new_tokens,
            block_length=sizes.block,
            steps=sizes.steps,
            temperature=temperature,
        ).tokens

    mine, theirs = write(1, 0.0), published_loop(model, prompt, sizes, 1, 0.0)[:, : sizes.new_tokens]
    if not torch.equal(mine, theirs[:, : mine.shape[1]]):
        raise RuntimeError("both sides should write the same greedy text, and do not: nothing is timed")
    return Case(
        "texts",
        "the published LLaDA loop",
        lambda: write(sizes.group, sizes.temperature),
        lambda: published_loop(model, prompt, sizes, sizes.group, sizes.temperature),
        "group of texts",
        asdict(sizes),
    )


def cases(only: str | None, smoke: bool, folder: Path) -> list[Callable[[], Case]]:
    """What is to be measured, each made when its turn comes."""
    image = ImageSizes(group=2, steps=2, side=4, codebook=24, places=12, width=24, layers=1) if smoke else ImageSizes()
    texts = [TextSizes(), TextSizes(vocabulary=4096)]
    if smoke:
        texts = [TextSizes(group=2, prompt=3, new_tokens=8, block=4, steps=4, vocabulary=40, width=24, layers=1)]
    made: list[Callable[[], Case]] = []
    if only in (None, "images"):
        made.append(lambda: images_case(image, folder / "amused"))
    if only in (None, "texts"):
        made += [lambda sizes=sizes: texts_case(sizes, folder / "llada") for sizes in texts]  # type: ignore[misc]
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["images", "texts"], help="one workload instead of both")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds of each side (default 5)")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 leaves torch's own choice")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes: that it runs, no figures")
    parser.add_argument("--out", type=Path, help="result file (default benchmarks/results/models-<cores>core.json)")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    if options.threads:
        torch.set_num_threads(options.threads)
    file = options.out or results() / f"models-{cores()}core{'-smoke' if options.smoke else ''}.json"
    load = round(os.getloadavg()[0], 1)  # before this adds to it
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for make in cases(options.only, options.smoke, Path(folder)):
            result = measure(make(), options.rounds, time.process_time)
            found.append(result)
            about = {"machine": machine(), "clock": "CPU seconds of the process", "load": load, "smoke": options.smoke}
            write_json(file, {**about, "results": found})
            if not options.smoke:
                print(f"{result['name']}: {result['ratio']}× ({result['ratio_min']}…{result['ratio_max']})", end=" ")
                print(f"against {result['peer']}, {result['settings']}", flush=True)
    print(file)


if __name__ == "__main__":
    main()

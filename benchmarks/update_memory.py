"""Peak memory of the GRPO update against the number of timesteps: streamed, and with every graph alive as published.

    python -m benchmarks.update_memory                        # writes benchmarks/results/update-memory-<device>.json
    python -m benchmarks.update_memory --timesteps 5 50 --width 256

Each point runs in a process of its own. On the CPU the peak is what PyTorch's allocator held, from its memory
events; on a GPU it is `torch.cuda.max_memory_allocated`. Weights and recorded trajectories are there before and are
not counted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import results
from pyunictokens import __version__, ops
from pyunictokens.models import Showo, ShowoConfig
from pyunictokens.models.showo import prompting
from pyunictokens.train.trajectories import ImageTrajectories
from pyunictokens.train.update import LossSettings, image_logprobs, only_rows_learn, streamed_backward
from pyunictokens.utils.files import write_json

MAX_TEXT, GUIDANCE, CODEBOOK, TEXT = 32, 5.0, 1024, 500


def build(width: int, layers: int, codes: int, device: str) -> Showo:
    torch.manual_seed(0)
    config = ShowoConfig(
        vocab_size=TEXT + 10 + CODEBOOK + 1,
        llm_vocab_size=TEXT,
        codebook_size=CODEBOOK,
        num_vq_tokens=codes,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=MAX_TEXT + codes + 8,
        bos_token_id=TEXT - 1,
        eos_token_id=TEXT - 1,
        max_text=MAX_TEXT,
    )
    return Showo(config).to(device).requires_grad_(True)


def trajectories(model: Showo, rows: int, timesteps: int, codes: int) -> ImageTrajectories:
    """Made-up codes; the memory of an update does not depend on what was drawn."""
    ids = prompting.SpecialIds.of(model)
    chosen = torch.randint(0, CODEBOOK, (rows, timesteps, codes))
    share = torch.linspace(1, 1 / codes, timesteps)[None, :, None]
    images = ImageTrajectories(
        prompts=[prompting.t2i_text(list(range(5, 15)), ids, MAX_TEXT)],
        prompt_of_row=[0] * rows,
        inputs_RTN=torch.where(torch.rand(rows, 1, codes) < share, -1, chosen).to(torch.int16),
        chosen_RTN=chosen.to(torch.int16),
        old_logp_RTN=torch.empty(0),
        empty_prompt=prompting.t2i_text([], ids, MAX_TEXT),
        guidance_scale=GUIDANCE,
    )
    images.old_logp_RTN = images.ref_logp_RTN = image_logprobs(model, images)
    return images


def every_graph_alive(model: Showo, advantages: torch.Tensor, images: ImageTrajectories) -> float:
    """The published way: full sequences, logits of the whole vocabulary, all T graphs kept for one backward pass."""
    ids = prompting.SpecialIds.of(model)
    first, count = model.config.first_code_id, images.inputs_RTN.shape[2]
    logps = []
    for step in range(images.inputs_RTN.shape[1]):
        batch = []
        for text in (images.prompts[0], images.empty_prompt):
            rows = [prompting.t2i(text[1:-1], codes, ids, MAX_TEXT) for codes in images.inputs_RTN[:, step].long()]
            batch += rows
        sequence = torch.stack(batch).to(model.device)
        logits = model(sequence, prompting.attention_allowed(sequence, "t2i", ids))
        cond, uncond = logits[:, -(count + 1) : -1, first : first + CODEBOOK].chunk(2)
        guided = (1 + GUIDANCE) * cond - GUIDANCE * uncond
        target = images.chosen_RTN[:, step].long().to(model.device)
        logps.append(guided.log_softmax(-1).gather(-1, target[..., None])[..., 0])
    loss, _ = ops.grpo_loss(
        torch.stack(logps, dim=1),
        images.old_logp_RTN.to(model.device),
        images.ref_logp_RTN.to(model.device) if images.ref_logp_RTN is not None else None,
        advantages.to(model.device),
        alpha=0.6,
    )
    loss.backward()
    return float(loss.detach())


def peak(call: Callable[[], object], device: str) -> int:
    """Most bytes held at once during `call`, beyond what was held before."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(file))
        events = [e for e in json.loads(file.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    held = top = 0
    for event in sorted(events, key=lambda each: each["ts"]):
        held += event["args"]["Bytes"]
        top = max(top, held)
    return top


def point(arguments: argparse.Namespace) -> dict[str, Any]:
    """One measurement, in this process."""
    model = build(arguments.width, arguments.layers, arguments.codes, arguments.device)
    if only_rows_learn(model):
        raise AssertionError("all weights must learn here")
    images = trajectories(model, arguments.rows, arguments.point, arguments.codes)
    advantages = torch.linspace(-1, 1, arguments.rows)
    settings = LossSettings(micro_rows=arguments.rows, micro_timesteps=1)

    def streamed() -> float:
        return streamed_backward(model, advantages, settings, images).loss

    def plain() -> float:
        return every_graph_alive(model, advantages, images)

    call = streamed if arguments.side == "streamed" else plain
    for parameter in model.parameters():  # gradients exist before, so that they are not counted
        parameter.grad = torch.zeros_like(parameter)
    held = peak(call, arguments.device)
    start = time.perf_counter()
    loss = call()
    if arguments.device != "cpu":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return {"side": arguments.side, "timesteps": arguments.point, "bytes": held, "seconds": seconds, "loss": loss}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timesteps", type=int, nargs="+", default=[5, 10, 20, 50])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--codes", type=int, default=64)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", choices=["streamed", "plain"], help=argparse.SUPPRESS)
    parser.add_argument("--point", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.point:
        print(json.dumps(point(arguments)))
        return
    shared = [f"--{key}={getattr(arguments, key)}" for key in ("width", "layers", "codes", "rows", "device")]
    points = []
    for side in ("streamed", "plain"):
        for steps in arguments.timesteps:
            command = [sys.executable, "-m", "benchmarks.update_memory", f"--side={side}", f"--point={steps}", *shared]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            points.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{side:9} T={steps:3d}  {points[-1]['bytes'] / 2**20:8.1f} MiB  {points[-1]['seconds']:.2f} s")
    streamed = {each["timesteps"]: each["bytes"] for each in points if each["side"] == "streamed"}
    few, many = min(streamed), max(streamed)
    result = {
        "what": "peak memory of one GRPO update over image tokens, weights and gradients not counted",
        "device": torch.cuda.get_device_name() if arguments.device != "cpu" else "cpu",
        "torch": torch.__version__,
        "pyunictokens": __version__,
        "settings": {key: getattr(arguments, key) for key in ("width", "layers", "codes", "rows")}
        | {"codebook": CODEBOOK, "guidance_scale": GUIDANCE, "dtype": "float32"},
        "growth": {"from": few, "to": many, "streamed": round(streamed[many] / streamed[few], 4)},
        "points": points,
    }
    write_json(arguments.out or results() / f"update-memory-{arguments.device.partition(':')[0]}.json", result)


if __name__ == "__main__":
    main()

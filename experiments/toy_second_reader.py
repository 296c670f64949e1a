"""Train the toy's second reader: an attribute network apart from the one that measures, for rewards of prompt lists.

    python experiments/toy_second_reader.py --into pyunictokens/assets/toy        # about a minute on one core

Other seeds, other width and scenes of its own, so that what it learns to mistake is not what the reader mistakes.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from toy_vq import degrade, slot_loss, to_pixels

from pyunictokens.models import MagvitV2
from pyunictokens.models.packed import pack
from pyunictokens.toy.drawing import render
from pyunictokens.toy.model import toy_folder
from pyunictokens.toy.networks import SECOND_WIDTH, AttributeReader
from pyunictokens.toy.scene import random_scene
from pyunictokens.utils.files import save_safetensors_atomic

SEED = 909


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, default=toy_folder())
    parser.add_argument("--scenes", type=int, default=9000)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    rng = np.random.default_rng(SEED)
    scenes = [random_scene(rng, held_out=None) for _ in range(args.scenes)]
    drawn = np.stack([render(scene) for scene in scenes])
    labels = torch.from_numpy(np.stack([scene.labels() for scene in scenes]))
    vq = MagvitV2.from_pretrained(toy_folder() / "vq")
    with torch.no_grad():
        again = torch.cat([vq.decode(vq.encode(to_pixels(drawn[k : k + 100]))) for k in range(0, len(drawn) // 2, 100)])
    torch.manual_seed(SEED)
    net = AttributeReader(SECOND_WIDTH).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, betas=(0.9, 0.98), weight_decay=0.02, fused=True)
    kept, start = len(drawn) - 500, time.time()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 30) * max(0.01, 1 - step / args.steps)
        rows = rng.choice(kept, args.batch, replace=False)
        x = to_pixels(drawn[rows])
        for k, row in enumerate(rows):
            if row < len(again) and k % 2:
                x[k] = again[row].clamp(-1, 1)
        with torch.autocast("cpu", torch.bfloat16):
            loss = slot_loss(net(degrade(x).contiguous(memory_format=torch.channels_last)), labels[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 2.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(f"{step + 1} {time.time() - start:.0f}s {loss.item():.3f}", flush=True)
    net.eval()
    with torch.no_grad():
        right = (net.read(to_pixels(drawn[kept:])) == labels[kept:]).float().mean(0)
    print("right of true drawings:", [round(each, 3) for each in right.tolist()])
    save_safetensors_atomic(args.into / "second_reader.safetensors", pack(net.state_dict()))


if __name__ == "__main__":
    main()

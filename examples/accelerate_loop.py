"""The fused ops in an Accelerate loop: one file for one process or many (DDP), in float32 or bfloat16.

Two things make it portable. The policy forms the loss inside `forward`, where a wrapper has whole parameters at hand
and autocast is on; and samples carry ids of their own, so each process draws other images from the same seed. Ratios
are taken per token (`maskgit_grpo_loss`, one operation) or per image (GSPO: log-probs, their mean, then the loss).

    python examples/accelerate_loop.py
    accelerate launch --num_processes 2 --cpu examples/accelerate_loop.py
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor, nn

import pyunictokens as uct

N, K, D, GROUP, STEPS = 16, 32, 48, 24, 6


class Policy(nn.Module):
    """A mixer over N positions with a head of K codes; −1 is the unknown code."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Embedding(K + 1, D)
        self.place = nn.Parameter(torch.randn(N, D) * 0.1)
        self.mix = nn.Sequential(nn.Linear(N, 2 * N), nn.GELU(), nn.Linear(2 * N, N))
        self.head = nn.Linear(D, K)

    def hidden(self, codes: Tensor) -> Tensor:
        """[..., N] to [..., N, D]."""
        x = self.codes(codes + 1) + self.place
        return x + self.mix(x.transpose(-1, -2)).transpose(-1, -2)

    def forward(self, inputs: Tensor, chosen: Tensor, old_logp: Tensor, advantages: Tensor, level: str) -> Tensor:
        """The GRPO loss of trajectories [R, STEPS, N]; `level` "token" or "sequence"."""
        hidden, weight, bias = self.hidden(inputs), self.head.weight, self.head.bias
        mask = uct.ops.token_mask(inputs, "newly_unmasked")
        if level == "token":
            loss, _, _ = uct.ops.maskgit_grpo_loss(
                hidden, weight, chosen, old_logp, None, advantages, bias, alpha=1.0, beta=0.0, mask=mask
            )
            return loss
        logp = uct.ops.selected_logprob(hidden, weight, chosen, bias)
        new, old = uct.ops.sequence_logprob(logp, mask), uct.ops.sequence_logprob(old_logp, mask)
        loss, _ = uct.ops.grpo_loss(new, old, None, advantages, beta=0.0, clip_low=0.02, clip_high=0.03)
        return loss * N  # the mean over N codes back to the size of their sum

    @torch.no_grad()
    def rollout(self, seed: int, sample_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes before each step, codes chosen at each step, and their log-probs: all [R, STEPS, N]."""
        codes = torch.full((len(sample_ids), N), uct.MASK, device=sample_ids.device)
        record, temperature = [], 1.0
        for step in range(STEPS):
            temperature *= 1 - (step + 1) / STEPS
            out = uct.ops.maskgit_step(
                self.head(self.hidden(codes)),
                codes,
                mask_len=uct.ops.mask_len("cosine", N, (codes == uct.MASK).sum(-1), step, STEPS),
                temperature=temperature,
                seed=seed,
                sample_ids=sample_ids,
                step=step,
            )
            record.append((codes, out.chosen, out.logp))
            codes = out.codes
        inputs, chosen, logp = (torch.stack(column, 1) for column in zip(*record, strict=True))
        return inputs, chosen, logp


def main(rounds: int = 30, level: str = "token", mixed_precision: str = "no") -> tuple[float, float]:
    """Train, print, and return the mean reward of the first and of the last five rounds."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=mixed_precision)
    policy = Policy()
    wrapped, optimizer = accelerator.prepare(policy, torch.optim.AdamW(policy.parameters(), lr=2e-3))
    share = GROUP // accelerator.num_processes
    sample_ids = torch.arange(share, device=accelerator.device) + share * accelerator.process_index
    rewards = []
    for number in range(rounds):
        inputs, chosen, old_logp = accelerator.unwrap_model(wrapped).rollout(number, sample_ids)
        reward = (chosen[:, -1] % 2 == 0).float().mean(-1)
        group_mean = accelerator.gather(reward).mean()
        for _ in range(2):  # the second pass has ratios other than 1, so clipping acts
            loss = wrapped(inputs, chosen, old_logp, reward - group_mean, level)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
        rewards.append(float(group_mean))
    first, last = sum(rewards[:5]) / 5, sum(rewards[-5:]) / 5
    accelerator.print(f"{level} ratios, precision {mixed_precision}: share of even codes {first:.3f} to {last:.3f}")
    return first, last


if __name__ == "__main__":
    main()
    main(level="sequence")

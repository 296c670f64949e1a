"""The fused ops in a training loop that is not this library's: a tiny MaskGIT policy learns to prefer even codes.

The policy is one transformer layer over 16 positions with a head of 32 codes. Each round draws a group of images in six
MaskGIT steps, rewards the share of even codes, and takes one GRPO step on all tokens of all timesteps. Runs in seconds:

    python examples/ops_in_your_loop.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import pyunictokens as uct

N, K, D, GROUP, STEPS = 16, 32, 48, 24, 6


class Policy(nn.Module):
    """Codes [B, N] (-1 unknown) to hidden states [B, N, D]; `head` belongs to it but is handed to the ops."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Embedding(K + 1, D)
        self.place = nn.Parameter(torch.randn(N, D) * 0.1)
        self.layer = nn.TransformerEncoderLayer(D, 4, 2 * D, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(D, K)

    def forward(self, codes_BN: Tensor) -> Tensor:
        return self.layer(self.codes(codes_BN + 1) + self.place)


def rollout(policy: Policy, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes before each step, codes chosen at each step, and their log-probs: all [GROUP, STEPS, N]."""
    codes = torch.full((GROUP, N), uct.MASK)
    inputs, chosen, logp = [], [], []
    temperature = 1.0
    for step in range(STEPS):
        inputs.append(codes)
        temperature *= 1 - (step + 1) / STEPS
        out = uct.ops.maskgit_step(
            policy.head(policy(codes)),
            codes,
            mask_len=uct.ops.mask_len("cosine", N, (codes == uct.MASK).sum(-1), step, STEPS),
            temperature=temperature,
            seed=seed,
            sample_ids=torch.arange(GROUP),
            step=step,
        )
        codes = out.codes
        chosen.append(out.chosen)
        logp.append(out.logp)
    return torch.stack(inputs, 1), torch.stack(chosen, 1), torch.stack(logp, 1)


def main(rounds: int = 40) -> tuple[float, float]:
    """Train, print, and return the mean reward of the first and of the last five rounds."""
    torch.manual_seed(0)
    policy = Policy()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=5e-4)
    rewards = []
    for number in range(rounds):
        with torch.no_grad():
            inputs, chosen, old_logp = rollout(policy, seed=number)
        reward = (chosen[:, -1] % 2 == 0).float().mean(-1)
        hidden = policy(inputs.flatten(0, 1)).unflatten(0, (GROUP, STEPS))
        loss, _, stats = uct.ops.maskgit_grpo_loss(
            hidden,
            policy.head.weight,
            chosen,
            old_logp,
            None,
            reward - reward.mean(),
            policy.head.bias,
            beta=0.0,
            mask=inputs == uct.MASK,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rewards.append(float(reward.mean()))
        if number % 10 == 9:
            print(f"round {number + 1}: reward {sum(rewards[-5:]) / 5:.3f}, clipped {float(stats.clip_fraction):.3f}")
    return sum(rewards[:5]) / 5, sum(rewards[-5:]) / 5


if __name__ == "__main__":
    main()

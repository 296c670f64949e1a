"""Token-by-token attention in every dtype and both forms against one softmax in fp64."""

import pytest
import torch

from pyunictokens.models import PromptKV
from pyunictokens.models.showo.attention import DecodeAttention


@pytest.mark.parametrize("sliced", [True, False])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 1.5e-2)]
)
def test_each_token_sees_its_prompt_and_its_answer_so_far(dtype, bound, sliced):
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * 1.5).to(dtype)

    lengths, rows, heads, width, steps = [9, 1, 4], [0, 0, 0, 1, 2, 2], 3, 16, 5
    prompts = PromptKV(*([[draw(heads, n, width) for _ in range(2)] for n in lengths] for _ in range(2)), [0] * 3)
    attend = DecodeAttention(prompts, rows, steps, sliced)
    kept, written = list(range(len(rows))), [([], []) for _ in range(2)]
    for step in range(steps):
        if step == 3:  # two answers have ended
            kept = [0, 2, 3, 5]
            attend.keep_rows(kept)
            written = [([k[kept] for k in keys], [v[kept] for v in values]) for keys, values in written]
        for layer in range(2):
            q, k, v = (draw(len(kept), heads, 1, width) for _ in range(3))
            written[layer][0].append(k)
            written[layer][1].append(v)
            ours = attend(layer, q, k, v)
            assert ours.dtype == dtype
            for place, row in enumerate(kept):
                keys, values = (
                    torch.cat([past[rows[row]][layer], *(new[place] for new in now)], 1).double()
                    for past, now in ((prompts.keys, written[layer][0]), (prompts.values, written[layer][1]))
                )
                truth = (q[place].double() @ keys.mT * width**-0.5).softmax(-1) @ values
                assert (ours[place].double() - truth).abs().max() < bound * truth.abs().max().clamp(min=1)
        attend.advance()

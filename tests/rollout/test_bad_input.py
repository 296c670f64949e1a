"""What generate_images refuses, each with a message that names the value and the way out."""

import pytest
import torch

from pyunictokens import DsogThreshold, RolloutEngine, ops
from pyunictokens.errors import UserError
from pyunictokens.rollout import Dsog

from .tiny import MAX_TEXT, CodesAsPixels, tiny_engine, tiny_model


def dsog(**options):
    return Dsog(DsogThreshold(), lambda pixels, index: torch.zeros(len(pixels)), **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "give at least one"),
        ({"prompts": "a dog"}, "give RolloutEngine a tokenizer"),
        ({"prompts": [[1], [60]]}, r"prompts\[1\] has the id 60: text ids of this model are 0…59"),
        ({"prompts": [1, 2]}, r"prompts\[0\] is no text and no list of ids"),
        ({"samples": 0}, "samples=0: must be an integer ≥ 1"),
        ({"samples": 1.5}, "samples=1.5"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 70000}, "steps=70000: must be an integer in 1…65536"),
        ({"guidance_scale": -1.0}, r"guidance_scale=-1.0: must be a finite number ≥ 0 \(0 turns guidance off\)"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale=inf"),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"seed": -1}, "seed=-1"),
        ({"sample_ids": [0]}, "1 sample_ids for 2 rows"),
        ({"sample_ids": [0, -1]}, "sample_ids hold -1"),
        ({"sample_ids": [0, 2**32], "dsog": dsog()}, "sample_ids hold 4294967296"),
        ({"known_codes": torch.zeros(3, 9, dtype=torch.long)}, "must be 1, 2 "),
        ({"known_codes": torch.zeros(9)}, "must be integers"),
        ({"known_codes": torch.full((9,), 24)}, "must lie in 0…23, or be -1 where unknown"),
        ({"known_codes": torch.full((9,), -2)}, "reach from -2"),
        ({"known_codes": torch.zeros(8, dtype=torch.long)}, "8 codes are no square"),
        ({"known_codes": torch.zeros(8, dtype=torch.long), "grid": (3, 3)}, "holds 9 codes, known_codes has 8"),
        ({"grid": (0, 3)}, "grid height=0"),
        ({"grid": (3,)}, "must be .height, width."),
        ({"grid": (11, 11)}, "use a smaller grid"),
        ({"dsog": dsog(preview_step=5), "steps": 4}, "preview_step=5: must be ≤ steps=4"),
    ],
)
def test_generate_images_refuses(change, message):
    given = {"prompts": [[1], [2]], "steps": 2, **change}
    with pytest.raises(UserError, match=message):
        tiny_engine().generate_images(given.pop("prompts"), **given)


def test_pixels_need_an_image_tokenizer():
    engine = RolloutEngine(tiny_model(), max_text=MAX_TEXT)
    with pytest.raises(UserError, match="give RolloutEngine a MagvitV2"):
        engine.generate_images([[1]], steps=2)
    with pytest.raises(UserError, match="give RolloutEngine a MagvitV2"):
        engine.generate_images([[1]], steps=2, decode=False, dsog=dsog())
    assert engine.generate_images([[1]], steps=2, decode=False).pixels is None
    with pytest.raises(UserError, match="images are pixels"):
        engine.generate_text(torch.zeros(1, 3, 3, 3), [[1]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "cosin"}, "schedule 'cosin'"),
        ({"max_text": 2}, "max_text=2"),
        ({"max_rows": 0}, "max_rows=0"),
    ],
)
def test_the_engine_refuses(options, message):
    with pytest.raises(UserError, match=message):
        RolloutEngine(tiny_model(), CodesAsPixels(), **{"max_text": MAX_TEXT, **options})


@pytest.mark.parametrize(
    ("options", "message"), [({"max_candidates": 0}, "max_candidates=0"), ({"preview_step": 0}, "preview_step=0")]
)
def test_dsog_refuses(options, message):
    with pytest.raises(UserError, match=message):
        dsog(**options)


def test_a_prompt_that_is_cut_is_named():
    with pytest.warns(UserWarning, match=r"prompts\[1\] has 30 ids: only the first 10 are read"):
        long = tiny_engine().generate_images([[1], list(range(30))], steps=2)
    short = tiny_engine().generate_images([[1], list(range(10))], steps=2)
    assert torch.equal(long.codes, short.codes)


def test_a_model_of_nan_is_reported():
    model = tiny_model()
    model.showo.model.embed_tokens.weight[50 + 6 - 1] = float("nan")  # <|t2i|>
    with pytest.raises(UserError, match="NaN"):
        tiny_engine(model).generate_images([[1]], steps=2)


def test_log_probs_that_are_not_finite_are_reported_where_the_op_cannot_look(monkeypatch):
    real = ops.maskgit_step

    def blind(*args, **options):  # as on a GPU, where looking at values would wait for the device
        out = real(*args, **options)
        return out._replace(logp=torch.full_like(out.logp, float("nan")))

    monkeypatch.setattr("pyunictokens.rollout.images.ops.maskgit_step", blind)
    with pytest.raises(UserError, match="log-probs that are not finite"):
        tiny_engine().generate_images([[1]], steps=2)

"""What generate_images refuses, each with a message that names the value and the way out; memory and Ctrl-C."""

import threading

import pytest
import torch

from pyunictokens import DsogThreshold, RolloutEngine, ops
from pyunictokens.models import Showo
from pyunictokens.rollout import Dsog, RolloutInterrupted
from pyunictokens.utils.errors import UserError
from pyunictokens.utils.memory import free_bytes

from .tiny import CodesAsPixels, tiny_engine, tiny_model


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
    engine = RolloutEngine(tiny_model())
    with pytest.raises(UserError, match="give RolloutEngine an image tokenizer"):
        engine.generate_images([[1]], steps=2)
    with pytest.raises(UserError, match="give RolloutEngine an image tokenizer"):
        engine.generate_images([[1]], steps=2, decode=False, dsog=dsog())
    assert engine.generate_images([[1]], steps=2, decode=False).pixels is None
    with pytest.raises(UserError, match="images are pixels"):
        engine.generate_text(torch.zeros(1, 3, 3, 3), [[1]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "cosin"}, "schedule 'cosin'"),
        ({"max_rows": 0}, "max_rows=0"),
    ],
)
def test_the_engine_refuses(options, message):
    with pytest.raises(UserError, match=message):
        RolloutEngine(tiny_model(), CodesAsPixels(), **options)


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

    monkeypatch.setattr("pyunictokens.rollout.sampler.ops.maskgit_step", blind)
    with pytest.raises(UserError, match="log-probs that are not finite"):
        tiny_engine().generate_images([[1]], steps=2)


# --- what happens in the middle of a run ----------------------------------------------------------


def test_more_rows_than_memory_are_split_and_said_once(monkeypatch):
    """A device that holds four rows: the engine finds it out, says so once, and draws the same images."""
    whole = tiny_engine().generate_images([[1, 2], [3]], samples=3, steps=3)
    ran, real = [], Showo.image_hidden

    def small_device(model, codes, *rest):
        if len(codes) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        ran.append(len(codes))
        return real(model, codes, *rest)

    monkeypatch.setattr(Showo, "image_hidden", small_device)
    engine = tiny_engine()
    with pytest.warns(UserWarning, match="12 rows need more memory than is free: they are run 6 at a time") as said:
        split = engine.generate_images([[1, 2], [3]], samples=3, steps=3)
        engine.generate_images([[1, 2], [3]], samples=3, steps=3)
    assert len(said) == 1 and max(ran) <= 4
    assert torch.equal(whole.codes, split.codes) and torch.equal(whole.inputs, split.inputs)


def test_rows_are_split_by_what_is_free_before_memory_runs_out(monkeypatch):
    ran, real = [], Showo.image_hidden
    monkeypatch.setattr(Showo, "image_hidden", lambda m, codes, *a: (ran.append(len(codes)), real(m, codes, *a))[1])
    row_bytes = 11 * (10 * 32 + 3 * 48) * 8
    monkeypatch.setattr("pyunictokens.utils.memory.free_bytes", lambda device: 2 * 5 * row_bytes)
    with pytest.warns(UserWarning, match="12 rows need more memory than is free: they are run 5 at a time"):
        tiny_engine().generate_images([[1, 2], [3]], samples=3, steps=3)
    assert ran == [3, 5, 5, 2, 5, 5, 2]  # step 0: two prompts and the empty one, each once


def test_a_row_that_fits_nowhere_is_an_error_and_other_errors_pass(monkeypatch):
    def raising(error):
        def hidden(*_):
            raise error

        monkeypatch.setattr(Showo, "image_hidden", hidden)

    raising(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(UserError, match="one row alone needs more memory"), pytest.warns(UserWarning):
        tiny_engine().generate_images([[1]], samples=2, steps=2)
    raising(RuntimeError("no such kernel"))
    with pytest.raises(RuntimeError, match="no such kernel"):
        tiny_engine().generate_images([[1]], steps=2)


def test_free_memory_of_this_machine_is_known():
    free = free_bytes(torch.device("cpu"))
    assert free is None or free > 1 << 20


def interrupting(monkeypatch, after):
    """Ctrl-C at the given call of the transformer."""
    calls, real = [], Showo.image_hidden

    def hidden(*arguments):
        calls.append(1)
        if len(calls) == after:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(Showo, "image_hidden", hidden)


def test_ctrl_c_keeps_the_finished_images(monkeypatch):
    engine = tiny_engine(max_rows=2)
    whole = engine.generate_images([[1, 2], [3], [4]], samples=2, steps=4, seed=3)
    interrupting(monkeypatch, 11)  # two waves of two rows are done, the third is at its third step
    with pytest.raises(RolloutInterrupted, match="stopped with 4 finished images") as stopped:
        engine.generate_images([[1, 2], [3], [4]], samples=2, steps=4, seed=3)
    assert isinstance(stopped.value, KeyboardInterrupt)
    kept, rows = stopped.value.rollout, stopped.value.rows
    assert len(rows) == 4
    assert kept.prompt_index.tolist() == whole.prompt_index[rows].tolist()
    for name in ("codes", "pixels", "inputs", "chosen", "logp", "sample_ids"):
        assert torch.equal(getattr(kept, name), getattr(whole, name)[rows])


def test_ctrl_c_while_pixels_are_decoded_keeps_the_codes(monkeypatch):
    engine = tiny_engine()
    whole = engine.generate_images([[1]], samples=2, steps=3)

    def decode(codes, shape):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.vq, "decode", decode)
    with pytest.raises(RolloutInterrupted, match="stopped with 2 finished images") as stopped:
        engine.generate_images([[1]], samples=2, steps=3)
    assert torch.equal(stopped.value.rollout.codes, whole.codes) and stopped.value.rollout.pixels is None


def test_ctrl_c_before_anything_is_finished(monkeypatch):
    interrupting(monkeypatch, 2)
    with pytest.raises(RolloutInterrupted, match="stopped with 0 finished images") as stopped:
        tiny_engine().generate_images([[1]], samples=2, steps=4, dsog=dsog(overlap=True))
    assert len(stopped.value.rollout) == 0 and stopped.value.rollout.pixels is None
    assert not any(thread.name.startswith("previews") for thread in threading.enumerate())


def test_ctrl_c_in_a_scorer_is_no_failed_preview():
    threshold = DsogThreshold()

    def scorer(pixels, index):
        raise KeyboardInterrupt

    with pytest.raises(RolloutInterrupted):
        tiny_engine().generate_images([[1]], samples=2, steps=4, dsog=Dsog(threshold, scorer))
    assert threshold.value == 0.5


def test_more_than_any_memory_is_refused_before_it_is_allocated():
    engine = tiny_engine()
    for ask in (
        lambda: engine.generate_images([[1]], samples=10**9),
        lambda: engine.generate_images([[1]] * 3, samples=10**8, record=False),
        lambda: engine.generate_images([[1]], samples=10**9, known_codes=torch.full((9,), -1)),
        lambda: engine.generate_text(torch.zeros(1, 9, dtype=torch.int64), [[1]], samples=10**9, max_new_tokens=2),
    ):
        with pytest.raises(UserError, match=r"would need .* GiB, .* GiB are free on cpu: ask for fewer at once"):
            ask()

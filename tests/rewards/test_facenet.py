"""MTCNN with its real weights on real photographs, InceptionResnetV1 as published, against facenet-pytorch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pyunictokens.rewards import Fer, RewardBatch
from pyunictokens.rewards.experts.facenet import Face, FerConfig, MtcnnFaceNet
from pyunictokens.rewards.networks import to_bytes
from pyunictokens.utils.errors import UserError

from .checkpoints import Folders, pixels_of

facenet_pytorch = pytest.importorskip("facenet_pytorch", reason="FER needs the extra `rewards`")
skimage_data = pytest.importorskip("skimage.data", reason="the photographs come with scikit-image")


@pytest.fixture(scope="module")
def photos() -> dict[str, Any]:
    """An astronaut (a large and, behind her, no other face), the same turned by 25° either way, and a cat."""
    from skimage.transform import rotate

    astronaut = skimage_data.astronaut()[:256, 64:384]
    found = {"astronaut": astronaut, "cat": skimage_data.chelsea()[:256, 64:384]}
    for degrees in (-25, 25):
        turned = rotate(astronaut, degrees, mode="edge", preserve_range=True)
        found[f"turned {degrees}"] = turned.round().astype(np.uint8)
    return found


@pytest.fixture(scope="module")
def net(saved: Folders) -> MtcnnFaceNet:
    return MtcnnFaceNet(FerConfig(str(saved.facenet)))


def bytes_of(photo: Any) -> torch.Tensor:
    return to_bytes(pixels_of(photo))


def test_the_face_is_found_where_the_library_finds_it(net: MtcnnFaceNet, photos: dict[str, Any]) -> None:
    from PIL import Image

    face = net.find(bytes_of(photos["astronaut"]))[0]
    assert face is not None
    boxes, _, points = facenet_pytorch.MTCNN().detect(Image.fromarray(photos["astronaut"]), landmarks=True)
    assert np.allclose(face.box, np.array(boxes[0], dtype=float), atol=0.01)
    (ax, ay), (bx, by) = points[0][:2]
    assert face.angle == pytest.approx(math.atan2(by - ay, bx - ax), abs=1e-4)
    assert abs(math.degrees(face.angle)) < 6  # she looks straight ahead


def test_a_cat_has_no_face(net: MtcnnFaceNet, photos: dict[str, Any]) -> None:
    assert net.find(bytes_of(photos["cat"])) == [None]


def test_turned_faces_are_brought_upright(net: MtcnnFaceNet, photos: dict[str, Any]) -> None:
    upright = bytes_of(photos["astronaut"])
    level = net.find(upright)[0]
    assert level is not None
    wanted = net.cut(upright[0], level)
    for degrees in (-25, 25):
        turned = bytes_of(photos[f"turned {degrees}"])
        face = net.find(turned)[0]
        assert face is not None
        assert math.degrees(face.angle - level.angle) == pytest.approx(-degrees, abs=8)
        aligned, plain = net.cut(turned[0], face), net.cut(turned[0], Face(face.box, 0.0))
        near = [float(torch.corrcoef(torch.stack([wanted.flatten(), a.flatten()]))[0, 1]) for a in (aligned, plain)]
        assert near[0] > 0.65 and near[0] > near[1] + 0.15, (degrees, near)


def test_a_level_face_is_cut_as_the_library_cuts_it(saved: Folders, photos: dict[str, Any]) -> None:
    photo = photos["astronaut"]
    for margin in (0, 32):
        net = MtcnnFaceNet(FerConfig(str(saved.facenet), align=False, margin=margin))
        face = net.find(bytes_of(photo))[0]
        assert face is not None
        mine = net.cut(bytes_of(photo)[0], face)
        from facenet_pytorch.models.utils.detect_face import extract_face

        theirs = facenet_pytorch.fixed_image_standardization(
            extract_face(torch.from_numpy(photo), np.array(face.box), 160, margin)
        )
        assert mine.shape == (3, 160, 160)
        assert (mine - theirs).abs().max() <= 2e-3


def test_turning_by_hand(net: MtcnnFaceNet) -> None:
    """A quarter turn moves the mark on the right of the face's middle to where `angle` says it came from."""
    image = torch.zeros(1, 3, 41, 41)
    image[..., 30, 20] = 1.0  # below the middle
    from pyunictokens.rewards.experts.facenet import _turned

    turned = _turned(image, Face((10.0, 10.0, 31.0, 31.0), math.pi / 2))
    where = divmod(int(turned[0, 0].argmax()), 41)
    assert where == (20, 30)  # what pointed down points right: the line through the eyes is level again
    assert float(turned.max()) == pytest.approx(1.0, abs=1e-3)


def test_embeddings_are_those_of_the_library(net: MtcnnFaceNet, saved: Folders, photos: dict[str, Any]) -> None:
    batch = torch.cat([pixels_of(photos[name]) for name in ("astronaut", "cat", "turned 25")])
    found, faces = net.encode_faces(batch)
    assert found.tolist() == [True, False, True]
    assert faces.shape == (3, 512) and faces[1].abs().sum() == 0

    model = facenet_pytorch.InceptionResnetV1(classify=True, num_classes=7).eval()
    (file,) = saved.facenet.glob("*.pt")
    model.load_state_dict(torch.load(file, weights_only=True))
    model.classify = False
    colours = to_bytes(batch)
    crops = torch.stack([net.cut(colours[row], face) for row, face in enumerate(net.find(colours)) if face is not None])
    with torch.no_grad():
        torch.testing.assert_close(faces[found], model(crops), atol=1e-5, rtol=1e-4)


def test_a_row_does_not_depend_on_its_neighbours(net: MtcnnFaceNet, photos: dict[str, Any]) -> None:
    batch = torch.cat([pixels_of(photos[name]) for name in ("cat", "turned -25", "astronaut")])
    together = net.encode_faces(batch)
    for row in range(3):
        alone = net.encode_faces(batch[row : row + 1])
        assert bool(alone[0]) == bool(together[0][row])
        torch.testing.assert_close(alone[1][0], together[1][row], atol=1e-4, rtol=1e-3)


def test_the_largest_face_counts(net: MtcnnFaceNet, photos: dict[str, Any]) -> None:
    """Two faces side by side, one of half the size: the larger one is taken wherever it stands."""
    from skimage.transform import resize

    large = photos["astronaut"]
    small = resize(large, (128, 160), preserve_range=True).astype(np.uint8)
    beside = np.full((256, 160, 3), 90, dtype=np.uint8)
    beside[64:192] = small
    for order in ([large, beside], [beside, large]):
        both = bytes_of(np.concatenate(order, axis=1))
        face, alone = net.find(both)[0], net.find(bytes_of(large))[0]
        assert face is not None and alone is not None
        shift = 0 if order[0] is large else 160
        assert np.allclose(face.box, np.array(alone.box) + [shift, 0, shift, 0], atol=6)


def test_fer_of_photographs(net: MtcnnFaceNet, photos: dict[str, Any]) -> None:
    drawn = torch.cat([pixels_of(photos[name]) for name in ("astronaut", "cat", "turned 25")])
    fer = Fer(net)
    batch = RewardBatch(drawn, ["p"] * 3, references=drawn[[0, 1]], kind="human")  # the cat photo does not count
    scores, absent = fer.score_and_absent(batch)
    assert absent.tolist() == [False, True, False]
    assert float(scores[0]) == pytest.approx(1.0, abs=1e-4) and scores[1] == 0
    assert 0 <= float(scores[2]) <= 1
    assert fer.face_embedding(drawn).shape == (2, 512)
    with pytest.raises(UserError, match="no face found in any of the 1 references"):
        fer.face_embedding(drawn[1:2])


def test_tiny_and_empty_pictures_have_no_face(net: MtcnnFaceNet) -> None:
    for size in ((8, 8), (19, 300), (20, 20), (64, 64)):
        found, faces = net.encode_faces(torch.zeros(2, 3, *size))
        assert found.tolist() == [False, False] and faces.shape == (2, 512)


@pytest.mark.parametrize("seed", range(3))
def test_noise_is_no_error(net: MtcnnFaceNet, seed: int) -> None:
    noise = torch.rand(2, 3, 70, 90, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    found, faces = net.encode_faces(noise)
    assert found.shape == (2,) and faces.isfinite().all()


def test_wrong_files_are_refused(saved: Folders, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (file,) = saved.facenet.glob("*.pt")
    weights = torch.load(file, weights_only=True)
    cut = tmp_path / "cut.pt"
    cut.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"cut\.pt: cannot be read as weights"):
        MtcnnFaceNet(FerConfig(str(cut))).load()
    torch.save({**weights, "more": torch.zeros(1)}, tmp_path / "more.pt")
    with pytest.raises(UserError, match=r"do not fit InceptionResnetV1: 1 left over \(more\)"):
        MtcnnFaceNet(FerConfig(str(tmp_path / "more.pt"))).load()
    torch.save({"state": {"a": 1}}, tmp_path / "nested.pt")
    with pytest.raises(UserError, match="must hold a dict of tensors"):
        MtcnnFaceNet(FerConfig(str(tmp_path / "nested.pt"))).load()
    torch.save(print, tmp_path / "code.pt")  # a pickled object: never run
    with pytest.raises(UserError, match="cannot be read as weights"):
        MtcnnFaceNet(FerConfig(str(tmp_path / "code.pt"))).load()
    old = {key: value for key, value in weights.items() if not key.endswith("num_batches_tracked")}
    save_file(old, tmp_path / "old.safetensors")  # another format, without counters, as old files are
    MtcnnFaceNet(FerConfig(str(tmp_path / "old.safetensors"))).load()
    for bad, message in (({"smallest": 4}, "smallest=4"), ({"margin": 160}, "margin=160"), ({"batch": 0}, "batch=0")):
        with pytest.raises(UserError, match=message):
            FerConfig("x", **bad)  # type: ignore[arg-type]

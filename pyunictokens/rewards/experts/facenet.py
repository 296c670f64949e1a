"""Faces for FER: MTCNN finds them, the largest is brought to the standard position, InceptionResnetV1 embeds it.

Both networks are facenet-pytorch's. MTCNN's weights come with that package; InceptionResnetV1's are read from a file in
the published layout (a state dict whose classifier rows `logits.*` are not used). All images of a batch are searched
together, on their device. The standard position (paper: "transform them to the standard position") is upright: the
image is turned about the middle of the face until the line through the eyes is level, then MTCNN's box is cut out.
Knows boxes and landmarks; does not know scores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...config.limits import within
from ...models.checkpoint import assign, load_tensors
from ...models.weight_files import WeightFiles
from ...utils.errors import UserError, require
from ..base import Device
from ..networks import Network, NetworkConfig, to_bytes

FACENET_FILES = ("20180402-114759-vggface2.pt", "20180408-102900-casia-webface.pt")
"""Published InceptionResnetV1 weights, by the names they are published under."""
FILES = WeightFiles(
    "FaceNet (InceptionResnetV1); MTCNN comes with facenet-pytorch",
    "the releases of facenet-pytorch",
    (FACENET_FILES,),
    "MIT (code and weights; trained on VGGFace2, whose pictures are for research)",
    "weights/facenet",
    f"curl -L --create-dirs -o {{folder}}/{FACENET_FILES[0]} "
    f"https://github.com/timesler/facenet-pytorch/releases/download/v2.2.9/{FACENET_FILES[0]}",
    also=("*.pt",),
    gigabytes=0.11,
)
SIDE = 160
"""Pixels along a side of the faces InceptionResnetV1 was trained on."""


@dataclass(frozen=True)
class FerConfig(NetworkConfig):
    """MTCNN and FaceNet. `path` is the file of the InceptionResnetV1 weights, or a folder that holds it."""

    align: bool = True
    """Level the eyes before the face is cut out; without, MTCNN's box is cut out as it stands."""
    smallest: int = 20
    """Faces with fewer pixels along a side are not looked for; the search takes time with 1/smallest²."""
    margin: int = 0
    """Pixels of the 160 around the box that show more than the face."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.smallest < 12:
            raise UserError(f"smallest={self.smallest}: must be at least 12, MTCNN's own window")
        within(0, SIDE - 1, margin=self.margin)


@dataclass(frozen=True)
class Face:
    """One face in an image, in its pixels."""

    box: tuple[float, float, float, float]
    """Left, top, right, bottom."""
    angle: float
    """How far the line through the eyes falls to the right, in radians."""


class MtcnnFaceNet(Network):
    """The networks of FER. MTCNN runs in float32 whatever `dtype` says: its boxes decide what is seen."""

    files: ClassVar[WeightFiles] = FILES
    config: FerConfig

    def locate(self) -> Path:
        file = Path(self.config.path).expanduser()
        return file if file.is_file() else super().locate()

    def _build(self, folder: Path) -> tuple[nn.Module, ...]:
        library = require("facenet_pytorch", "rewards")
        file = folder if folder.is_file() else next(folder / n for n in FACENET_FILES if (folder / n).is_file())
        embedder = library.InceptionResnetV1(pretrained=None)
        assign(embedder, _read(file, embedder), file)
        finder = library.MTCNN(min_face_size=self.config.smallest, select_largest=True, device=self.device)
        return finder, embedder.to(self.dtype)

    def to(self, device: Device) -> None:
        super().to(device)
        module: Any
        for module in self._modules or ():
            module.device = self.device  # facenet-pytorch keeps it beside the weights

    @torch.no_grad()
    def encode_faces(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(a face was found, bool [B]; embeddings [B, 512], float32, of unit length, zeros where none was found)."""
        _, embedder = self.load()
        colours = to_bytes(pixels).to(self.device)
        faces = self.find(colours)
        rows = [row for row, face in enumerate(faces) if face is not None]
        found_B = torch.tensor([face is not None for face in faces], device=self.device)
        result = torch.zeros(len(faces), 512, device=self.device)
        if rows:
            crops = torch.stack([self.cut(colours[row], face) for row, face in enumerate(faces) if face is not None])
            result[rows] = self.batched(lambda part: embedder(part.to(self.dtype)).float(), crops)
        return found_B, result

    def find(self, colours: Tensor) -> list[Face | None]:
        """The largest face in each image, uint8 [B, 3, H, W], or None."""
        finder = self._net
        if min(colours.shape[-2:]) < self.config.smallest:
            return [None] * len(colours)  # no face of that size can be in it
        faces: list[Face | None] = []
        for part in colours.split(self.config.batch):
            try:
                faces += _largest(finder.detect(part.permute(0, 2, 3, 1), landmarks=True))
            except RuntimeError as error:
                if "non-empty list" not in str(error):
                    raise
                # MTCNN's way of saying that every candidate of the whole batch lies outside its image
                faces += [None] * len(part) if len(part) == 1 else [f for one in part for f in self.find(one[None])]
        return faces

    def cut(self, colour: Tensor, face: Face) -> Tensor:
        """The face in an image, uint8 [3, H, W], as InceptionResnetV1 wants it: float32 [3, 160, 160].

        Equal to facenet-pytorch's own cut for a level face: whole pixels, area resampling, back to 8 bits.
        """
        image = colour[None].float()
        if self.config.align and face.angle:
            image = _turned(image, face)
        left, top, right, bottom = face.box
        share = self.config.margin / (SIDE - self.config.margin) / 2
        wide, high = (right - left) * share, (bottom - top) * share
        height, width = image.shape[-2:]
        x0, x1 = int(max(left - wide, 0)), int(min(right + wide, width))
        y0, y1 = int(max(top - high, 0)), int(min(bottom + high, height))
        crop = image[:, :, y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]
        crop = F.interpolate(crop, (SIDE, SIDE), mode="area").floor()
        return (crop[0] - 127.5) / 128.0


def _largest(found: tuple[Any, Any, Any]) -> list[Face | None]:
    """Of MTCNN's boxes, probabilities and landmarks, sorted by area, the first of each image."""
    faces: list[Face | None] = []
    for boxes, points in zip(found[0], found[2], strict=True):
        if boxes is None:
            faces.append(None)
            continue
        left, top, right, bottom = (float(value) for value in boxes[0])
        if not (right - left >= 1 and bottom - top >= 1):
            faces.append(None)
            continue
        (ax, ay), (bx, by) = (
            (float(x), float(y)) for x, y in points[0][:2]
        )  # the eye on the left, the one on the right
        faces.append(Face((left, top, right, bottom), math.atan2(by - ay, bx - ax)))
    return faces


def _turned(image: Tensor, face: Face) -> Tensor:
    """An image [1, 3, H, W] turned about the middle of the face until the eyes are level; edges are carried on."""
    height, width = image.shape[-2:]
    cx, cy = (face.box[0] + face.box[2]) / 2, (face.box[1] + face.box[3]) / 2
    y, x = torch.meshgrid(
        torch.arange(height, device=image.device, dtype=torch.float32) + 0.5 - cy,
        torch.arange(width, device=image.device, dtype=torch.float32) + 0.5 - cx,
        indexing="ij",
    )
    cos, sin = math.cos(face.angle), math.sin(face.angle)
    grid = torch.stack(((cos * x - sin * y + cx) / width, (sin * x + cos * y + cy) / height), dim=-1) * 2 - 1
    return F.grid_sample(image, grid[None], mode="bilinear", padding_mode="border", align_corners=False)


def _read(file: Path, embedder: nn.Module) -> dict[str, Tensor]:
    """The embedder's weights in `file` (.pt or .safetensors): no classifier, and counters that old files lack."""
    weights = load_tensors(file)
    kept = {key: value for key, value in weights.items() if not key.startswith("logits.")}
    counters = {key: value for key, value in embedder.state_dict().items() if key.endswith("num_batches_tracked")}
    return {**counters, **kept}

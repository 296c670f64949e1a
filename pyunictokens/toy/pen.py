"""The pen of the toy world: a canvas with a moved and scaled origin, colours, and patterned bodies with one outline.

What a cat or a kite looks like is said in drawing.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..utils.errors import needs

with needs("data"):
    from PIL import Image, ImageDraw

SIZE = 64
ZOOM = 4
INK = (38, 32, 48)
RGB = {
    "red": (220, 40, 40),
    "orange": (247, 140, 25),
    "yellow": (252, 220, 45),
    "green": (45, 160, 65),
    "blue": (45, 95, 220),
    "purple": (135, 60, 185),
    "pink": (252, 140, 190),
    "white": (246, 246, 246),
}
HAIR_RGB = {"black": (40, 36, 44), "brown": (120, 72, 36), "blond": (240, 205, 105), "ginger": (205, 85, 30)}
_LIGHT = {"white", "yellow", "pink"}
Point = tuple[float, float]
Colour = tuple[int, int, int]


def shade(colour: Colour, factor: float) -> Colour:
    return tuple(min(255, int(channel * factor)) for channel in colour)  # type: ignore[return-value]


def contrast(name: str) -> Colour:
    """The second colour of a pattern: dark on light colours, white on the others."""
    return shade(RGB[name], 0.42) if name in _LIGHT else (250, 250, 245)


Fill = tuple[int, ...] | int
"""A colour, or the value of a mask."""


class Pen:
    """A canvas with a moved and scaled origin; lengths are pixels of the 64-pixel picture."""

    def __init__(self, image: Image.Image, origin: Point = (0.0, 0.0), scale: float = 1.0) -> None:
        self.image, self.origin, self.scale = image, origin, scale
        self.draw = ImageDraw.Draw(image)

    def at(self, point: Point) -> Point:
        (x, y), (left, top) = point, self.origin
        return (left + x * self.scale) * ZOOM, (top + y * self.scale) * ZOOM

    def on(self, image: Image.Image) -> Pen:
        return Pen(image, self.origin, self.scale)

    def _width(self, width: float) -> int:
        return max(1, round(width * self.scale * ZOOM))

    def oval(self, centre: Point, rx: float, ry: float, fill: Fill, grow: float = 0.0) -> None:
        (x, y), rx, ry = centre, rx + grow, ry + grow
        self.draw.ellipse([*self.at((x - rx, y - ry)), *self.at((x + rx, y + ry))], fill=fill)

    def box(
        self, left: float, top: float, right: float, bottom: float, fill: Fill, radius: float = 0.0, grow: float = 0.0
    ) -> None:
        corners = [*self.at((left - grow, top - grow)), *self.at((right + grow, bottom + grow))]
        self.draw.rounded_rectangle(corners, radius=self._width(radius + grow) if radius + grow else 0, fill=fill)

    def poly(self, points: Sequence[Point], fill: Fill, grow: float = 0.0) -> None:
        self.draw.polygon([self.at(point) for point in points], fill=fill)
        if grow:
            self.line([*points, points[0], points[1]], fill, 2 * grow)

    def line(self, points: Sequence[Point], fill: Fill, width: float) -> None:
        self.draw.line([self.at(point) for point in points], fill=fill, width=self._width(width), joint="curve")

    def ring(self, centre: Point, radius: float, fill: Fill, width: float) -> None:
        x, y = centre
        outer = radius + width / 2
        corners = [*self.at((x - outer, y - outer)), *self.at((x + outer, y + outer))]
        self.draw.ellipse(corners, outline=fill, width=self._width(width))


Part = Callable[[Pen, Fill, float], None]


def oval(centre: Point, rx: float, ry: float) -> Part:
    return lambda pen, fill, grow: pen.oval(centre, rx, ry, fill, grow)


def poly(*points: Point) -> Part:
    return lambda pen, fill, grow: pen.poly(list(points), fill, grow)


def box(left: float, top: float, right: float, bottom: float, radius: float = 0.0) -> Part:
    return lambda pen, fill, grow: pen.box(left, top, right, bottom, fill, radius, grow)


def body(pen: Pen, parts: list[Part], colour: str, pattern: str) -> None:
    """Fill the union of the parts with a patterned colour and put one outline around it."""
    for part in parts:
        part(pen, INK, 0.9)
    if pattern == "plain":
        for part in parts:
            part(pen, RGB[colour], 0.0)
        return
    mask = Image.new("L", pen.image.size)
    for part in parts:
        part(pen.on(mask), 255, 0.0)
    cloth = Image.new("RGB", pen.image.size, RGB[colour])
    weave = pen.on(cloth)
    second = contrast(colour)
    if pattern == "striped":
        for y in np.arange(-32, 36, 7.2):
            weave.box(-30, y, 30, y + 3.2, second)
    elif pattern == "dotted":
        for row, y in enumerate(np.arange(-33.5, 36, 6.2)):
            for x in np.arange(-34 + 3.6 * (row % 2), 34, 7.2):
                weave.oval((x, y), 1.9, 1.9, second)
    else:
        for row, y in enumerate(np.arange(-35, 36, 5.0)):
            for x in np.arange(-35 + 5.0 * (row % 2), 35, 10.0):
                weave.box(x, y, x + 5.0, y + 5.0, second)
    pen.image.paste(cloth, mask=mask)

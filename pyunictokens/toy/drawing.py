"""How a toy scene looks: flat, outlined shapes on one of six backgrounds, drawn at four times the size and scaled down.

Everything is drawn large, because an autoencoder with an 8×8 grid of codes must be able to keep it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ..utils.errors import needs
from .pen import HAIR_RGB, INK, RGB, SIZE, ZOOM, Colour, Pen, Point, body, box, contrast, oval, poly, shade
from .scene import Attributes

with needs("data"):
    from PIL import Image


def _eyes(pen: Pen, left: Point, right: Point) -> None:
    for eye in (left, right):
        pen.oval(eye, 2.9, 3.1, (255, 255, 255), 0.5)
        pen.oval((eye[0], eye[1] + 0.3), 1.9, 2.1, (20, 18, 28))


def _smile(pen: Pen, x: float, y: float, width: float = 2.6, ink: Colour = INK) -> None:
    arc = [(x + width * math.cos(a), y + 0.6 * width * math.sin(a)) for a in np.linspace(0.15, math.pi - 0.15, 9)]
    pen.line(arc, ink, 0.9)


# Where things are worn, in the subject's own units: top of the head, eyes, neck with its half width.
_ANCHORS: dict[str, tuple[Point, Point, Point, Point, float]] = {
    "human": ((0, -17.5), (-4.3, -7), (4.3, -7), (0, 4.5), 9.5),
    "cat": ((0, -16.5), (-4.6, -8), (4.6, -8), (0, 3), 9.5),
    "dog": ((0, -17), (-4.6, -10), (4.6, -10), (0, 3), 9.5),
    "bird": ((0, -13.5), (-4.6, -5.5), (4.6, -5.5), (0, 5.5), 13),
    "fish": ((-4, -10.5), (-9.2, -3), (0.2, -3), (-3, 6.5), 11),
    "rabbit": ((0, -11.5), (-4.4, -4.5), (4.4, -4.5), (0, 6), 9.5),
    "mug": ((-2, -13), (-6.6, -3.5), (2.6, -3.5), (-2, 7.5), 11.5),
    "star": ((0, -15), (-4.6, -3.5), (4.6, -3.5), (0, 6.5), 9.5),
    "house": ((0, -17), (-5.6, 1.5), (5.6, 1.5), (0, 9.5), 13),
    "robot": ((0, -18), (-4.6, -11), (4.6, -11), (0, -1.5), 9.5),
}


def _cat(pen: Pen, colour: str, pattern: str) -> None:
    pen.line([(8, 15), (15, 14), (17, 8), (15, 3)], INK, 5.4)
    pen.line([(8, 15), (15, 14), (17, 8), (15, 3)], RGB[colour], 3.6)
    ears = [poly((-10.5, -10), (-9.5, -21), (-2, -16)), poly((10.5, -10), (9.5, -21), (2, -16))]
    body(pen, [oval((0, 11), 10.5, 10), oval((0, -7.5), 11.5, 10), *ears], colour, pattern)
    for side in (-1, 1):
        pen.poly([(side * 8.6, -14), (side * 8.4, -18), (side * 5, -15.4)], (250, 170, 180))
        pen.line([(side * 5, -2.2), (side * 13.5, -3.6)], INK, 0.7)
        pen.line([(side * 5, -0.8), (side * 13, 0.6)], INK, 0.7)
    _eyes(pen, (-4.6, -8), (4.6, -8))
    pen.poly([(-1.8, -3.8), (1.8, -3.8), (0, -1.8)], (240, 110, 130))


def _dog(pen: Pen, colour: str, pattern: str) -> None:
    pen.line([(8, 12), (14, 8), (16, 2)], INK, 5.2)
    pen.line([(8, 12), (14, 8), (16, 2)], RGB[colour], 3.4)
    body(pen, [oval((0, 11), 10.5, 10), oval((0, -8), 10.5, 10.5)], colour, pattern)
    for side in (-1, 1):
        pen.oval((side * 11.4, -6.5), 3.6, 8.6, INK, 0.8)
        pen.oval((side * 11.4, -6.5), 3.6, 8.6, shade(RGB[colour], 0.55))
    pen.oval((0, -2.2), 6, 4.6, (250, 240, 225))
    pen.box(-1.6, 0.5, 1.6, 4.2, (240, 90, 110), 1.5)
    pen.oval((0, -4.6), 2.6, 1.9, (20, 18, 28))
    _eyes(pen, (-4.6, -10), (4.6, -10))


def _bird(pen: Pen, colour: str, pattern: str) -> None:
    for side in (-1, 1):
        foot = [(side * 4, 13), (side * 4, 18.5)]
        pen.line(foot, (240, 140, 20), 2.0)
        pen.line([(side * 4 - 3, 18.6), (side * 4 + 3, 18.6)], (240, 140, 20), 2.0)
    wings = [poly((s * 10, -1), (s * 19, -7), (s * 18.5, 3), (s * 14, 8), (s * 9, 9)) for s in (-1, 1)]
    tuft = [poly((-3, -13), (-4, -19), (0, -15), (4, -19), (3, -13))]
    body(pen, [*wings, *tuft, oval((0, 0.5), 13.5, 14)], colour, pattern)
    _eyes(pen, (-4.6, -5.5), (4.6, -5.5))
    pen.poly([(-4.2, -1), (0, -3.2), (4.2, -1), (0, 4.4)], (245, 150, 20), 0.4)
    pen.line([(-4, -0.8), (4, -0.8)], (190, 100, 10), 0.7)


def _fish(pen: Pen, colour: str, pattern: str) -> None:
    tail = poly((10, 0), (19, -11), (16.5, 0), (19, 11))
    fins = [poly((-2, -9), (4, -16), (9, -7)), poly((0, 9), (6, 15.5), (8, 7))]
    body(pen, [tail, *fins, oval((-3, 0), 15, 11.2)], colour, pattern)
    _eyes(pen, (-9.2, -3), (0.2, -3))
    pen.oval((-15.5, 3), 2, 1.6, (230, 80, 100), 0.5)


def _rabbit(pen: Pen, colour: str, pattern: str) -> None:
    ears = [oval((-5, -17), 3.5, 9.5), oval((5, -17), 3.5, 9.5)]
    pen.oval((11, 14), 4, 4, INK, 0.8)
    pen.oval((11, 14), 4, 4, (250, 250, 250))
    body(pen, [*ears, oval((0, 12), 10, 8.5), oval((0, -3.5), 10.2, 9)], colour, pattern)
    for side in (-1, 1):
        pen.oval((side * 5, -17), 1.4, 6.5, (252, 175, 190))
        pen.line([(side * 4.5, 0.6), (side * 11, -0.4)], INK, 0.7)
    _eyes(pen, (-4.4, -4.5), (4.4, -4.5))
    pen.oval((0, -0.4), 1.6, 1.2, (240, 110, 130))
    pen.box(-1.7, 1.6, 1.7, 4.6, (255, 255, 255), 0.4, 0.3)


def _mug(pen: Pen, colour: str, pattern: str) -> None:
    pen.ring((11, 2), 6.4, INK, 5.4)
    pen.ring((11, 2), 6.4, RGB[colour], 3.6)
    for x in (-6, 2):
        pen.line([(x, -15), (x + 1.6, -17.5), (x - 0.8, -20), (x + 1, -22.5)], (235, 235, 240), 1.5)
    body(pen, [box(-14, -11, 10, 17, 3), oval((-2, -11), 12, 3.2)], colour, pattern)
    pen.oval((-2, -11), 10.2, 2.2, (95, 55, 30))
    _eyes(pen, (-6.6, -3.5), (2.6, -3.5))
    _smile(pen, -2, 1.5)


def _star(pen: Pen, colour: str, pattern: str) -> None:
    corners = []
    for k in range(10):
        radius, angle = (19.5 if k % 2 == 0 else 10.0), math.pi * k / 5 - math.pi / 2
        corners.append((radius * math.cos(angle), 1 + radius * math.sin(angle)))
    body(pen, [poly(*corners)], colour, pattern)
    _eyes(pen, (-4.6, -3.5), (4.6, -3.5))
    _smile(pen, 0, 1.5)


def _house(pen: Pen, colour: str, pattern: str) -> None:
    pen.box(6.5, -17, 11, -6, INK)
    pen.box(7.3, -16.2, 10.2, -6, (175, 90, 70))
    body(pen, [box(-14, -5, 14, 18)], colour, pattern)
    pen.poly([(-17.5, -4), (0, -19), (17.5, -4)], INK, 0.9)
    pen.poly([(-16.5, -4.4), (0, -18.4), (16.5, -4.4)], (150, 75, 55))
    for x in (-7.5, 7.5):
        pen.box(x - 3.6, -2, x + 3.6, 5, INK)
        pen.box(x - 2.9, -1.3, x + 2.9, 4.3, (255, 240, 150))
        pen.line([(x, -1.3), (x, 4.3)], INK, 0.7)
        pen.line([(x - 2.9, 1.5), (x + 2.9, 1.5)], INK, 0.7)
    pen.box(-3.4, 8, 3.4, 18, INK, 1.5)
    pen.box(-2.6, 8.8, 2.6, 18, (120, 70, 40), 1.2)


def _robot(pen: Pen, colour: str, pattern: str) -> None:
    pen.line([(0, -18), (0, -23)], INK, 1.4)
    pen.oval((0, -23.5), 1.9, 1.9, (250, 80, 60), 0.4)
    for side in (-1, 1):
        pen.line([(side * 11, 3), (side * 16.5, 9)], INK, 4.4)
        pen.line([(side * 11, 3), (side * 16.2, 8.6)], (150, 155, 165), 2.8)
        pen.oval((side * 16.5, 9.5), 2.5, 2.5, (150, 155, 165), 0.3)
        pen.box(side * 5.5 - 2.6, 14, side * 5.5 + 2.6, 19.5, (150, 155, 165), 0.8, 0.6)
    pen.box(-3, -5, 3, 0, (150, 155, 165), 0, 0.6)
    body(pen, [box(-11.5, -1.5, 11.5, 15, 1.5), box(-10.5, -18, 10.5, -4, 2)], colour, pattern)
    for x in (-4.6, 4.6):
        pen.oval((x, -11), 3.2, 3.2, (40, 45, 60), 0.3)
        pen.oval((x, -11), 1.9, 1.9, (120, 240, 255))
    pen.box(-5, -7.2, 5, -5.2, (40, 45, 60))


def _human(pen: Pen, scene: Attributes) -> None:
    style, hair = scene.word("shape"), HAIR_RGB[scene.word("hair")]
    light, dark = (255, 222, 196), (150, 98, 66)
    skin = tuple(int(a + (b - a) * scene.skin) for a, b in zip(light, dark, strict=True))
    if style == "long":
        for colour, grow in ((INK, 0.9), (hair, 0.0)):
            pen.box(-13, -14, 13, 12, colour, 6, grow)
    if style == "curly":
        for colour, grow in ((INK, 0.9), (hair, 0.0)):
            for a in np.linspace(0.82 * math.pi, 2.18 * math.pi, 9):
                pen.oval((11 * math.cos(a), -8.5 + 9.5 * math.sin(a)), 4.8, 4.8, colour, grow)
    shirt = poly((-6, 5), (6, 5), (13.5, 8), (17, 14), (17.5, 32), (-17.5, 32), (-17, 14), (-13.5, 8))
    body(pen, [shirt], scene.word("colour"), scene.word("pattern"))
    pen.poly([(-4, 0), (4, 0), (4.6, 6), (0, 9.5), (-4.6, 6)], skin, 0.2)
    pen.oval((0, -7), 9.6, 10.2, INK, 0.8)
    pen.oval((0, -7), 9.6, 10.2, skin)
    if style != "curly":
        cap = (
            [(-10, -8)]
            + [(10.6 * math.cos(a), -7 - 11 * math.sin(a)) for a in np.linspace(math.pi, 0, 17)]
            + [(10, -8)]
        )
        fringe = [(7.5, -10.5), (3, -12.5), (-2, -11), (-6.5, -12)]
        pen.poly([*cap, *fringe], INK, 0.7)
        pen.poly([*cap, *fringe], hair)
    else:
        for x, y in ((-6.5, -14), (-2.2, -15.5), (2.2, -15.5), (6.5, -14)):
            pen.oval((x, y), 3.4, 3.0, hair)
    _eyes(pen, (-4.3, -7), (4.3, -7))
    _smile(pen, 0, -1.8, 3.2, (180, 50, 60))


SUBJECTS: dict[str, Callable[[Pen, str, str], None]] = {
    "cat": _cat,
    "dog": _dog,
    "bird": _bird,
    "fish": _fish,
    "rabbit": _rabbit,
    "mug": _mug,
    "star": _star,
    "house": _house,
    "robot": _robot,
}


def _wear(pen: Pen, what: str, name: str, key: str) -> None:
    (tx, ty), left, right, (nx, ny), half = _ANCHORS[key]
    colour, dark = RGB[name], shade(RGB[name], 0.68)
    if what == "hat":
        pen.box(tx - 7.5, ty - 9.5, tx + 7.5, ty + 1, colour, 1.5, 0.9)
        pen.oval((tx, ty + 1), 12.5, 2.8, INK, 0.9)
        for fill, grow in ((INK, 0.9), (colour, 0.0)):
            pen.box(tx - 7.5, ty - 9.5, tx + 7.5, ty + 1, fill, 1.5, grow)
        pen.oval((tx, ty + 1), 12.5, 2.8, colour)
        pen.box(tx - 7.5, ty - 3.6, tx + 7.5, ty - 0.9, dark)
    elif what == "scarf":
        for fill, grow in ((INK, 0.9), (colour, 0.0)):
            pen.box(nx - half - 1, ny - 3, nx + half + 1, ny + 3.2, fill, 2.8, grow)
            pen.box(nx - half + 1, ny, nx - half + 7.5, ny + 13, fill, 1, grow)
        for y in (7.5, 10.5):
            pen.box(nx - half + 1, ny + y, nx - half + 7.5, ny + y + 1.2, dark)
    elif what == "glasses":
        for eye in (left, right):
            pen.ring(eye, 4.5, INK, 4.2)
            pen.ring(eye, 4.5, colour, 2.8)
        pen.line([(left[0] + 4, left[1] - 1), (right[0] - 4, right[1] - 1)], colour, 2.2)
    else:
        bx, by = tx + 6.5, ty + 0.5
        loops = [[(bx, by), (bx - 9.5, by - 6), (bx - 9.5, by + 6)], [(bx, by), (bx + 9.5, by - 6), (bx + 9.5, by + 6)]]
        for fill, grow in ((INK, 0.9), (colour, 0.0)):
            for loop in loops:
                pen.poly(loop, fill, grow)
        pen.oval((bx, by), 2.9, 3.1, INK, 0.7)
        pen.oval((bx, by), 2.9, 3.1, dark)


def draw_item(pen: Pen, what: str, name: str) -> None:
    colour, dark, light = RGB[name], shade(RGB[name], 0.68), contrast(name)
    if what == "ball":
        pen.oval((0, 1), 7.6, 7.6, INK, 0.9)
        pen.oval((0, 1), 7.6, 7.6, colour)
        pen.poly([(-7.4, -0.6), (7.4, -0.6), (7.4, 2.6), (-7.4, 2.6)], light)
    elif what == "kite":
        pen.line([(0, 2), (-2.5, 6), (2, 10), (-1.5, 14)], INK, 1.2)
        corners = [(0, -14), (7.6, -5), (0, 5), (-7.6, -5)]
        pen.poly(corners, INK, 0.9)
        pen.poly(corners, colour)
        pen.line([(0, -14), (0, 5)], light, 1.2)
        pen.line([(-7.6, -5), (7.6, -5)], light, 1.2)
        pen.poly([(-4, 8), (-4, 12), (4, 8), (4, 12)], colour)
    elif what == "boat":
        pen.box(-0.8, -9, 0.8, 3, INK)
        pen.poly([(1.4, -9), (1.4, 1), (8, 1)], INK, 0.7)
        pen.poly([(1.4, -9), (1.4, 1), (8, 1)], colour)
        pen.poly([(-8.5, 2.5), (8.5, 2.5), (5.5, 8.8), (-5.5, 8.8)], INK, 0.8)
        pen.poly([(-8.5, 2.5), (8.5, 2.5), (5.5, 8.8), (-5.5, 8.8)], colour)
    elif what == "block":
        pen.poly([(-7.5, -4), (-3.5, -7.5), (8, -7.5), (8, 4), (4, 8), (-7.5, 8)], INK, 0.9)
        pen.poly([(-7.5, -4), (-3.5, -7.5), (8, -7.5), (4, -4)], shade(colour, 1.25))
        pen.poly([(4, -4), (8, -7.5), (8, 4), (4, 8)], dark)
        pen.box(-7.5, -4, 4, 8, colour)
        pen.box(-4.6, -1.2, 1.2, 5.2, light)
    elif what == "apple":
        for fill, grow in ((INK, 0.9), (colour, 0.0)):
            pen.oval((-2.8, 1.8), 5.0, 6.4, fill, grow)
            pen.oval((2.8, 1.8), 5.0, 6.4, fill, grow)
        pen.line([(0, -3.5), (0.8, -8.5)], (95, 55, 30), 1.7)
        pen.oval((4.6, -6.8), 3.6, 1.9, (60, 150, 50), 0.2)
    else:
        pen.box(-8, -1.5, 8, 8.5, INK, 1, 0.9)
        pen.box(-8, -1.5, 8, 8.5, colour, 1)
        pen.box(-8, -2.5, 8, 1.2, (255, 250, 235), 1.6)
        for x in (-5.5, 0, 5.5):
            pen.oval((x, 1.4), 1.7, 1.9, (255, 250, 235))
        pen.box(-0.9, -8, 0.9, -2.5, colour)
        pen.oval((0, -9.6), 1.3, 1.9, (255, 190, 40))


def draw_place(pen: Pen, name: str) -> None:
    def band(top: float, bottom: float, fill: Colour) -> None:
        pen.box(0, top, SIZE, bottom, fill)

    if name == "beach":
        band(0, 26, (150, 215, 250))
        band(26, 40, (40, 140, 205))
        band(40, 64, (245, 222, 160))
        pen.oval((9, 9), 5.5, 5.5, (255, 225, 70))
    elif name == "meadow":
        band(0, 34, (190, 230, 255))
        band(34, 64, (130, 205, 95))
        pen.oval((12, 9), 7, 3, (255, 255, 255))
        pen.oval((17, 11), 6, 2.6, (255, 255, 255))
        for x, y in ((5, 44), (10, 56), (45, 40), (60, 41), (43, 60)):
            pen.oval((x, y), 1.8, 1.8, (250, 120, 160))
            pen.oval((x, y), 0.8, 0.8, (255, 240, 120))
    elif name == "night":
        band(0, 46, (28, 32, 78))
        band(46, 64, (45, 58, 72))
        pen.oval((10, 11), 6, 6, (250, 245, 200))
        pen.oval((13, 9.5), 5.2, 5.2, (28, 32, 78))
        for x, y in ((4, 26), (22, 4), (46, 6), (57, 13), (60, 30), (49, 22), (7, 38)):
            pen.oval((x, y), 1.0, 1.0, (255, 250, 215))
    elif name == "snow":
        band(0, 36, (176, 192, 212))
        band(36, 64, (236, 243, 250))
        pen.poly([(2, 38), (8, 16), (14, 38)], (70, 120, 105))
        pen.poly([(5, 26), (8, 14), (11, 26)], (235, 243, 250))
        for x, y in ((20, 7), (33, 3), (46, 9), (59, 5), (52, 19), (61, 27), (3, 8), (45, 32)):
            pen.oval((x, y), 1.3, 1.3, (255, 255, 255))
    elif name == "room":
        band(0, 44, (238, 205, 190))
        band(44, 64, (160, 105, 65))
        band(43, 45, (250, 240, 230))
        pen.box(2, 5, 15, 21, (250, 250, 250), 0, 1)
        pen.box(3, 6, 8, 20, (130, 195, 240))
        pen.box(9, 6, 14, 20, (130, 195, 240))
    else:
        band(0, 38, (255, 200, 130))
        band(38, 64, (222, 150, 80))
        pen.oval((50, 42), 22, 8, (222, 150, 80))
        pen.oval((55, 9), 6, 6, (255, 110, 60))
        pen.box(4.5, 20, 8.5, 46, (60, 125, 70), 2)
        pen.box(0.5, 26, 3.2, 34, (60, 125, 70), 1.2)
        pen.box(1, 32, 6, 34.6, (60, 125, 70), 1)


def render(scene: Attributes, size: int = SIZE) -> np.ndarray:
    """Draw a scene: uint8 [size, size, 3]. The same scene gives the same picture, byte for byte."""
    image = Image.new("RGB", (SIZE * ZOOM, SIZE * ZOOM))
    draw_place(Pen(image), scene.word("place"))
    pen = Pen(image, (26 + scene.dx, 38 + scene.dy), scene.scale)
    if scene.kind == "human":
        _human(pen, scene)
    else:
        SUBJECTS[scene.word("shape")](pen, scene.word("colour"), scene.word("pattern"))
    if scene.wear:
        _wear(
            pen,
            scene.word("wear"),
            scene.word("wear_colour"),
            "human" if scene.kind == "human" else scene.word("shape"),
        )
    if scene.item:
        origin = (53.5 + 0.3 * scene.dx, 50 - (8 if scene.word("item") == "kite" else 0) + 0.5 * scene.dy)
        draw_item(Pen(image, origin), scene.word("item"), scene.word("item_colour"))
    return np.asarray(image.resize((size, size), Image.Resampling.BOX if size <= 256 else Image.Resampling.LANCZOS))

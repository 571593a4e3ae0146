"""One scene: textured shapes of all sizes, overlapping, on textured ground among clutter that has no class.

Shape alone tells the classes apart, since ground and clutter have the textures that objects have. The constants were
fixed before anything was trained on the scenes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.random import RandomState
from numpy.typing import NDArray

from fpn_export.scenes.shapes import SHAPES, Field, Shape
from fpn_export.scenes.textures import Colors, make_texture, value_noise

NAMES = tuple(SHAPES)
SIZE = (480, 640)  # height and width of a scene in pixels
SMALLEST, LARGEST = 8.0, 400.0  # diameter of the circle around an object, in pixels, log-uniform
OBJECTS = (6, 28)  # how many are tried per scene
CLUTTER = (10, 30)  # unlabelled shards and lines per scene
LEAST_VISIBLE = 0.3  # share of an object's pixels that later ones leave
ATTEMPTS = 12  # places tried for an object before it is given up
CROWDING = 0.45  # chance that an object is put beside another one
DISORDER = 0.7  # large ones are mostly, not always, behind small ones: spread of log size when ordering


class Scene(NamedTuple):
    """A picture and what is visible in it, from back to front.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        boxes: (n, 4) float32, x1 y1 x2 y2 around the visible pixels, half-open.
        labels: (n,) int64, 1-based index into ``NAMES``.
        masks: (n, H, W) bool, the visible pixels.
        coverage: (n,) float32, share of each object's pixels that others hide.
    """

    image: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    masks: NDArray[np.bool_]
    coverage: NDArray[np.float32]


class _Outline(NamedTuple):
    """Where a shape would lie: its window in the scene, opacity there, and the coordinates within the shape."""

    window: tuple[slice, slice]
    alpha: Field
    across: Field
    along: Field


def make_scene(seed: int, index: int, size: tuple[int, int] = SIZE) -> Scene:
    """Scene number ``index`` of the data set ``seed``: the same in every order, process and run."""
    random = RandomState([seed, index])
    drawing = _Drawing(random, size)
    for _ in range(random.randint(*CLUTTER)):
        drawing.add_clutter()
    diameters = np.exp(random.uniform(math.log(SMALLEST), math.log(LARGEST), random.randint(*OBJECTS)))
    for diameter in diameters[np.argsort(-diameters * np.exp(random.normal(0, DISORDER, len(diameters))))]:
        drawing.add_object(random.randint(len(NAMES)) + 1, float(diameter))
    return drawing.finish()


class _Drawing:
    """A scene while it is drawn: the picture, and which object owns each pixel."""

    def __init__(self, random: RandomState, size: tuple[int, int]) -> None:
        self._random = random
        self._size = size
        y, x = np.mgrid[: size[0], : size[1]].astype(np.float32)
        haze = value_noise(random, *size, random.uniform(20, 120))[..., None]
        self._canvas = 0.7 * make_texture(random, x, y, random.uniform(6, 80)) + 0.3 * haze
        self._owner = np.zeros(size, dtype=np.int32)  # 0: none, k: the k-th object
        self._labels: list[int] = []
        self._areas: list[int] = [0]  # pixels of each owner, hidden ones included
        self._visible: list[int] = [0]
        self._centres: list[tuple[float, float]] = []

    def add_object(self, label: int, diameter: float) -> None:
        """Draw an object where it hides no other too much, if such a place is found."""
        for _ in range(ATTEMPTS):
            centre = self._choose_centre(diameter)
            outline = _outline(self._random, SHAPES[NAMES[label - 1]], centre, diameter / 2, self._size)
            solid = outline.alpha > 0.5
            hidden = np.bincount(self._owner[outline.window][solid], minlength=len(self._areas)).tolist()
            rows = zip(hidden[1:], self._visible[1:], self._areas[1:], strict=True)
            if solid.any() and all(h == 0 or v - h >= LEAST_VISIBLE * a for h, v, a in rows):
                break
        else:
            return
        shade = 1 + self._random.uniform(0, 0.25) * (outline.across + outline.along)[..., None]
        self._paint(outline.window, outline.alpha, self._texture(outline.window, diameter / 2) * shade)
        self._owner[outline.window][solid] = len(self._areas)
        self._visible = [v - h for v, h in zip(self._visible, hidden, strict=True)] + [int(solid.sum())]
        self._areas.append(int(solid.sum()))
        self._labels.append(label)
        self._centres.append(centre)

    def add_clutter(self) -> None:
        """Draw a shard with a ragged outline, or a line."""
        random = self._random
        radius = float(np.exp(random.uniform(math.log(4), math.log(120))))
        cx, cy = random.uniform(0, self._size[1]), random.uniform(0, self._size[0])
        window = _window((cx, cy), radius, self._size)
        y, x = np.mgrid[window].astype(np.float32)
        if random.uniform() < 0.3:
            angle = random.uniform(0, math.pi)
            across = math.cos(angle) * (x - cx) + math.sin(angle) * (y - cy)
            distance = np.abs(across) - random.uniform(0.5, 4)
        else:
            ragged = value_noise(random, x.shape[0], x.shape[1], max(2.0, radius / 2))
            distance = np.hypot(x - cx, y - cy) - radius * (0.25 + ragged)
        self._paint(window, np.clip(0.5 - distance, 0, 1), self._texture(window, radius))

    def finish(self) -> Scene:
        count = len(self._labels)
        masks = self._owner == np.arange(1, count + 1, dtype=np.int32)[:, None, None]
        pairs = zip(self._visible[1:], self._areas[1:], strict=True)
        return Scene(
            image=(np.clip(self._canvas, 0, 1) * 255 + 0.5).astype(np.uint8),
            boxes=np.array([_box_of(mask) for mask in masks], np.float32).reshape(count, 4),
            labels=np.array(self._labels, np.int64),
            masks=masks,
            coverage=np.array([1 - visible / area for visible, area in pairs], np.float32),
        )

    def _choose_centre(self, diameter: float) -> tuple[float, float]:
        """Anywhere or beside another object; the whole object lies inside the picture."""
        random, radius = self._random, diameter / 2
        if self._centres and random.uniform() < CROWDING:
            near = self._centres[random.randint(len(self._centres))]
            x, y = (c + random.normal(0, radius + 12) for c in near)
        else:
            x, y = random.uniform(0, self._size[1]), random.uniform(0, self._size[0])
        return (
            float(np.clip(x, radius, self._size[1] - radius)),
            float(np.clip(y, radius, self._size[0] - radius)),
        )

    def _texture(self, window: tuple[slice, slice], radius: float) -> Colors:
        y, x = np.mgrid[window].astype(np.float32)
        return make_texture(self._random, x, y, self._random.uniform(3, max(4.0, radius)))

    def _paint(self, window: tuple[slice, slice], alpha: Field, colors: Colors) -> None:
        under = self._canvas[window]
        under += alpha[..., None] * (colors - under)


def _outline(
    random: RandomState, shape: Shape, centre: tuple[float, float], radius: float, size: tuple[int, int]
) -> _Outline:
    """The shape, turned and squeezed at random, one pixel of soft edge."""
    window = _window(centre, radius + 1, size)
    y, x = np.mgrid[window].astype(np.float32)
    angle, squeeze = random.uniform(0, 2 * math.pi), random.uniform(0.75, 1.0)
    u, v = (x + 0.5 - centre[0]) / radius, (y + 0.5 - centre[1]) / radius
    across, along = math.cos(angle) * u + math.sin(angle) * v, math.cos(angle) * v - math.sin(angle) * u
    distance = shape(across, along / squeeze) * (radius * squeeze)
    return _Outline(window, np.clip(0.5 - distance, 0, 1), across, along)


def _window(centre: tuple[float, float], radius: float, size: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns around a centre (x, y), clipped to the scene."""
    (x, y), (height, width) = centre, size
    return (
        slice(max(0, math.floor(y - radius)), min(height, math.ceil(y + radius))),
        slice(max(0, math.floor(x - radius)), min(width, math.ceil(x + radius))),
    )


def _box_of(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1

import errno
import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from fpn_engine.detections import Detections
from fpn_engine.drawing import category_color, draw_detections, save_picture, text_color
from fpn_engine.errors import FpnEngineError
from fpn_engine.spec import Category

NAMES = ("red cell", "white\ncell", "血小板")


def make_detections(boxes: list[list[float]], labels: list[int], scores: list[float] | None = None) -> Detections:
    scores = scores or [1 - 0.01 * i for i in range(len(boxes))]
    return Detections(
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        scores=np.array(scores, np.float32),
        labels=np.array(labels, np.int64),
        image_size=(0, 0),
        categories=tuple(Category(id=i, name=name) for i, name in enumerate(NAMES, start=1)),
    )


def grey(height: int, width: int) -> NDArray[np.uint8]:
    return np.full((height, width, 3), 200, np.uint8)


def test_a_box_is_drawn_just_inside_its_half_open_edges() -> None:
    image = grey(400, 400)
    drawn = np.asarray(draw_detections(image, make_detections([[100, 150, 300, 350]], [1])))
    color = category_color(0)
    for y, x in ((250, 100), (250, 299), (150, 280), (349, 200)):
        assert tuple(drawn[y, x]) == color
    outside, inside = drawn[250, 301], drawn[250, 200]
    assert tuple(outside) == tuple(inside) == (200, 200, 200)
    assert tuple(drawn[250, 300]) != color  # the dark halo


def test_the_tag_stands_above_the_box_and_below_the_edge_where_there_is_no_room() -> None:
    color = category_color(0)
    high = np.asarray(draw_detections(grey(400, 400), make_detections([[100, 150, 300, 350]], [1])))
    assert (high[140, 105:130] == color).all(-1).any()
    low = np.asarray(draw_detections(grey(400, 400), make_detections([[100, 0, 300, 350]], [1])))
    assert (low[8, 103:130] == color).all(-1).any()
    assert (low[:16, 100:180] > 230).all(-1).any()  # white letters


def test_tags_of_equal_boxes_do_not_cover_each_other() -> None:
    drawn = np.asarray(draw_detections(grey(400, 400), make_detections([[100, 150, 300, 350]] * 2, [1, 2])))
    assert (drawn[:149] == category_color(0)).all(-1).sum() > 100
    assert (drawn[351:] == category_color(1)).all(-1).sum() > 100


def test_the_best_detection_is_on_top() -> None:
    drawn = np.asarray(draw_detections(grey(400, 400), make_detections([[50, 50, 300, 300]] * 3, [3, 1, 2])))
    assert tuple(drawn[200, 50]) == category_color(2)


def test_nothing_found_gives_the_picture_unchanged_and_drawing_never_touches_the_image() -> None:
    image = np.random.default_rng(0).integers(0, 256, (37, 53, 3), np.uint8)
    before = image.copy()
    picture = draw_detections(image, make_detections([], []))
    assert np.array_equal(np.asarray(picture), image)
    assert not np.array_equal(np.asarray(draw_detections(image, make_detections([[3, 3, 30, 30]], [1]))), image)
    assert np.array_equal(image, before)
    image[:] = 0
    assert np.array_equal(np.asarray(picture), before)


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1), (2, 3), (13, 40)])
@pytest.mark.parametrize("box", [[0, 0, 1, 1], [-50, -50, 5000, 5000], [0.4, 0.4, 0.45, 0.45], [9e3, 9e3, 1e4, 1e4]])
def test_tiny_pictures_and_boxes_beyond_them_are_drawn(size: tuple[int, int], box: list[float]) -> None:
    picture = draw_detections(grey(*size), make_detections([box] * 3, [1, 2, 3]))
    assert picture.size == (size[1], size[0])
    assert picture.mode == "RGB"


def test_lines_and_letters_grow_with_the_picture() -> None:
    def inked(side: int) -> float:
        box = [0.25 * side, 0.25 * side, 0.75 * side, 0.75 * side]
        return float((np.asarray(draw_detections(grey(side, side), make_detections([box], [1]))) != 200).mean())

    assert inked(3000) == pytest.approx(inked(1000), rel=0.25)  # the halo is always one pixel


@pytest.mark.parametrize("image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)])
def test_other_arrays_are_refused(image: NDArray[np.uint8]) -> None:
    with pytest.raises(ValueError, match=r"\(H, W, 3\) uint8"):
        draw_detections(image, make_detections([], []))


def test_colors_differ_and_their_text_is_readable() -> None:
    colors = [category_color(i) for i in range(20)]
    for first, second in itertools.combinations(colors, 2):
        assert np.abs(np.subtract(first, second)).sum() > 40
    assert category_color(0) == (215, 51, 55)  # stable: pictures of different runs can be compared
    for color in colors:
        assert contrast(color, text_color(color)) >= 4.5  # WCAG 2 level AA


def contrast(first: tuple[int, int, int], second: tuple[int, int, int]) -> float:
    def luminance(color: tuple[int, int, int]) -> float:
        s = np.array(color) / 255
        linear = np.where(s <= 0.04045, s / 12.92, ((s + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".JPEG"])
def test_a_picture_is_saved_into_a_new_folder(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "a" / "b" / f"cells{suffix}"
    save_picture(Image.fromarray(grey(20, 30)), path)
    with Image.open(path) as saved:
        assert saved.size == (30, 20)
    assert os.listdir(path.parent) == [path.name]


def test_an_unknown_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FpnEngineError, match=r"cells\.xyz: unknown picture format '\.xyz'; use"):
        save_picture(Image.fromarray(grey(2, 2)), tmp_path / "cells.xyz")


def test_a_folder_that_is_a_file_is_said_plainly(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(FpnEngineError, match=r"cannot write .*cells\.png"):
        save_picture(Image.fromarray(grey(2, 2)), tmp_path / "file" / "cells.png")
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_picture_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    def save_half(picture: Image.Image, path: Path, **options: object) -> None:
        path.write_bytes(b"half")
        raise failure

    path = tmp_path / "cells.png"
    save_picture(Image.fromarray(grey(2, 2)), path)
    before = path.read_bytes()
    monkeypatch.setattr(Image.Image, "save", save_half)
    expected = "cannot write .*: No space left" if isinstance(failure, OSError) else None
    with pytest.raises((FpnEngineError, KeyboardInterrupt), match=expected):
        save_picture(Image.fromarray(grey(3, 3)), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["cells.png"]

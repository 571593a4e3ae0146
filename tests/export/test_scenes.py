"""The generated scenes: the same every time, hard in the ways they promise, true to their own annotations."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from fpn_engine.annotations import load_annotations
from fpn_engine.errors import FpnEngineError
from fpn_export.scenes import CATEGORIES, NAMES, SIZE, Scene, SceneDataset, make_scene, write_coco
from fpn_export.scenes.scene import LARGEST, LEAST_VISIBLE
from fpn_export.scenes.shapes import SHAPES

SMALL = 32**2


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [make_scene(7, index) for index in range(60)]


def test_a_scene_is_the_same_in_any_order() -> None:
    first = [make_scene(3, index, (120, 160)) for index in (0, 1)]
    again = [make_scene(3, index, (120, 160)) for index in (1, 0)][::-1]
    for a, b in zip(first, again, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_seeds_and_indices_differ() -> None:
    images = [make_scene(seed, index, (120, 160)).image for seed, index in ((0, 1), (1, 0), (0, 0), (1, 1))]
    assert all(not np.array_equal(a, b) for n, a in enumerate(images) for b in images[:n])


def test_scale_matters(scenes: list[Scene]) -> None:
    assert len(NAMES) >= 8
    areas = np.concatenate([scene.masks.sum(axis=(1, 2)) for scene in scenes])
    boxes = np.concatenate([scene.boxes for scene in scenes])
    sides = boxes[:, 2:] - boxes[:, :2]
    assert (sides.prod(axis=1) < SMALL).mean() >= 0.35
    assert (areas < SMALL).mean() >= 0.35
    assert (sides.prod(axis=1) > 96**2).mean() >= 0.2
    assert sides.max() > 300
    assert sides.max() <= LARGEST + 2
    labels = np.concatenate([scene.labels for scene in scenes])
    assert set(labels.tolist()) == set(range(1, len(NAMES) + 1))
    assert np.bincount(labels)[1:].min() > 0.04 * len(labels)


def test_objects_hide_each_other_but_never_wholly(scenes: list[Scene]) -> None:
    coverage = np.concatenate([scene.coverage for scene in scenes])
    assert (coverage > 0.02).mean() >= 0.3
    assert coverage.max() <= 1 - LEAST_VISIBLE + 1e-6
    assert coverage.min() == 0


def test_boxes_and_masks_are_of_one_mind(scenes: list[Scene]) -> None:
    for scene in scenes[:20]:
        assert scene.image.shape == (*SIZE, 3)
        assert scene.masks.sum(axis=0).max() <= 1  # a pixel shows one object
        for (x1, y1, x2, y2), mask in zip(scene.boxes.astype(int), scene.masks, strict=True):
            outside = mask.copy()
            outside[y1:y2, x1:x2] = False
            assert not outside.any()
            assert mask[y1].any()
            assert mask[y2 - 1].any()
            assert mask[:, x1].any()
            assert mask[:, x2 - 1].any()


@pytest.mark.parametrize("name", NAMES)
def test_a_shape_is_inside_its_circle_and_fills_some_of_it(name: str) -> None:
    y, x = np.mgrid[-1.5:1.5:301j, -1.5:1.5:301j]
    inside = SHAPES[name](x, y) < 0
    assert np.hypot(x, y)[inside].max() <= 1.01
    assert inside.mean() * 9 > 0.6


def test_dataset_items_are_what_detectors_take() -> None:
    dataset = SceneDataset(5, 3, (120, 160))
    image, target = dataset[2]
    scene = make_scene(5, 2, (120, 160))
    assert torch.equal(image, torch.from_numpy(scene.image).permute(2, 0, 1))
    assert torch.equal(target["boxes"], torch.from_numpy(scene.boxes))
    assert target["labels"].dtype == torch.int64
    assert target["masks"].shape == (len(scene.labels), 120, 160)
    with pytest.raises(IndexError):
        dataset[3]
    assert len(list(iter(dataset))) == 3


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # within pycocotools
def test_coco_files_hold_the_scenes(tmp_path: Path) -> None:
    path = write_coco(tmp_path / "new" / "scenes", seed=5, count=2, size=(120, 160))
    truth = load_annotations(path)
    truth.check_categories(CATEGORIES)
    document = json.loads(path.read_text())
    for index in range(2):
        scene = make_scene(5, index, (120, 160))
        assert np.array_equal(np.array(Image.open(path.parent / "images" / f"{index:06d}.png")), scene.image)
        rows = [row for row in document["annotations"] if row["image_id"] == index + 1]
        assert [row["category_id"] for row in rows] == scene.labels.tolist()
        for row, mask, box in zip(rows, scene.masks, scene.boxes, strict=True):
            assert np.array_equal(coco_mask.decode(row["segmentation"]).astype(bool), mask)
            assert row["bbox"] == [box[0], box[1], box[2] - box[0], box[3] - box[1]]
    assert len({row["id"] for row in document["annotations"]}) == len(document["annotations"])


def test_several_processes_write_the_same(tmp_path: Path) -> None:
    drawn: list[int] = []
    one = write_coco(tmp_path / "one", seed=5, count=19, size=(60, 80))
    two = write_coco(tmp_path / "two", 5, 19, (60, 80), lambda: drawn.append(1), processes=2)
    assert one.read_bytes() == two.read_bytes()
    assert len(drawn) == 19
    for path in (tmp_path / "one" / "images").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / "images" / path.name).read_bytes()


def test_earlier_scenes_make_way(tmp_path: Path) -> None:
    write_coco(tmp_path, seed=1, count=3, size=(60, 80))
    (tmp_path / "images" / "mine.png").write_bytes(b"")
    path = write_coco(tmp_path, seed=2, count=1, size=(60, 80))
    assert sorted(os.listdir(tmp_path / "images")) == ["000000.png", "mine.png"]
    assert [image.file_name for image in load_annotations(path).images] == ["000000.png"]


@pytest.mark.parametrize("content", ['{"info": {"description": "COCO 2017"}, "images": []}', "[1]", "{", ""])
def test_other_annotations_stay(tmp_path: Path, content: str) -> None:
    (tmp_path / "annotations.json").write_text(content)
    with pytest.raises(FpnEngineError, match="is not of generated scenes and would be replaced; give another folder"):
        write_coco(tmp_path, seed=0, count=1, size=(60, 80))
    assert (tmp_path / "annotations.json").read_text() == content
    assert os.listdir(tmp_path) == ["annotations.json"]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_folder_that_cannot_be_written(tmp_path: Path, processes: int) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FpnEngineError, match="cannot write"):
        write_coco(tmp_path / "file" / "scenes", seed=0, count=1, size=(60, 80), processes=processes)

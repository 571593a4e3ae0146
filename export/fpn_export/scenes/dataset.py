"""Scenes as a PyTorch data set, and as a COCO data set on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.utils.data import Dataset

from fpn_engine.errors import FpnEngineError
from fpn_engine.files import replacing, unwritable
from fpn_engine.spec import Category
from fpn_export.scenes.scene import NAMES, SIZE, Scene, make_scene

CATEGORIES = tuple(Category(id=number, name=name) for number, name in enumerate(NAMES, start=1))
ANNOTATIONS = "annotations.json"
IMAGES = "images"
DESCRIPTION = "fpn-engine scenes"


class SceneDataset(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Scenes 0..count-1 of a seed, made when they are asked for.

    Items are ``(image, target)`` as torchvision's detectors take them: image (3, H, W) uint8; target with boxes (n, 4)
    float32 in pixels, labels (n,) int64 from 1, masks (n, H, W) bool and image_id.
    """

    def __init__(self, seed: int, count: int, size: tuple[int, int] = SIZE) -> None:
        self.seed, self.count, self.size = seed, count, size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        scene = make_scene(self.seed, index, self.size)
        target = {
            "boxes": torch.from_numpy(scene.boxes),
            "labels": torch.from_numpy(scene.labels),
            "masks": torch.from_numpy(scene.masks),
            "image_id": torch.tensor(index),
        }
        return torch.from_numpy(scene.image).permute(2, 0, 1).contiguous(), target


def write_coco(
    folder: Path,
    seed: int,
    count: int,
    size: tuple[int, int] = SIZE,
    on_image: Callable[[], None] = lambda: None,
    *,
    processes: int = 1,
) -> Path:
    """Write scenes as PNG files and a COCO instances file with boxes and run-length masks; returns the latter's path.

    Scenes that the folder has already make way.

    Args: processes: that draw, each of them a new interpreter; the files are the same for any number.
    Raises: FpnEngineError if the folder cannot be written, or has annotations of something else.
    """
    path = folder / ANNOTATIONS
    _make_way(path, count)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index, rows in enumerate(_draw_all(partial(_draw, folder, seed, size), count, processes)):
        images.append({"id": index + 1, "file_name": _name(index), "height": size[0], "width": size[1]})
        annotations += [{"id": len(annotations) + 1 + n, "image_id": index + 1, **row} for n, row in enumerate(rows)]
        on_image()
    document = {
        "info": {"description": f"{DESCRIPTION}, seed {seed}"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": category.id, "name": category.name} for category in CATEGORIES],
    }
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(document), encoding="ascii")
    return path


def _make_way(path: Path, count: int) -> None:
    """Remove the annotations of earlier scenes, which would soon be wrong, and pictures from number ``count`` on."""
    if not os.path.isfile(path):
        return
    try:
        document = json.loads(path.read_bytes())
        ours, earlier = document["info"]["description"].startswith(DESCRIPTION), len(document["images"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        ours, earlier = False, 0
    if not ours:
        raise FpnEngineError(f"{path} is not of generated scenes and would be replaced; give another folder")
    try:
        for stale in [path, *(path.parent / IMAGES / _name(index) for index in range(count, earlier))]:
            stale.unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(path, error) from None


def _draw_all(
    draw: Callable[[int], list[dict[str, Any]]], count: int, processes: int
) -> Iterator[list[dict[str, Any]]]:
    """What ``draw`` gives for 0..count-1, in order."""
    if processes == 1:
        yield from map(draw, range(count))
        return
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"))
    try:
        yield from pool.map(draw, range(count), chunksize=8)
    finally:
        pool.shutdown(cancel_futures=True)


def _name(index: int) -> str:
    return f"{index:06d}.png"


def _draw(folder: Path, seed: int, size: tuple[int, int], index: int) -> list[dict[str, Any]]:
    """Write one scene's picture; its annotations."""
    scene = make_scene(seed, index, size)
    with replacing(folder / IMAGES / _name(index)) as temporary:
        Image.fromarray(scene.image).save(temporary, format="PNG")
    return _annotate(scene)


def _annotate(scene: Scene) -> list[dict[str, Any]]:
    """Of each object, but for its number and the image's."""
    rows = []
    for box, label, mask in zip(scene.boxes, scene.labels, scene.masks, strict=True):
        x1, y1, x2, y2 = box.tolist()
        run_lengths = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        rows.append(
            {
                "category_id": int(label),
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": int(mask.sum()),
                "iscrowd": 0,
                "segmentation": {"size": run_lengths["size"], "counts": run_lengths["counts"].decode("ascii")},
            }
        )
    return rows

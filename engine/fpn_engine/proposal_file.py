"""Proposal files: boxes that one detector found, for another to classify (Lin et al. 2017, table 2).

JSON is that of COCO: the results array, entries of ``image_id`` or ``file_name`` or both, ``bbox`` (x, y, width,
height in pixels of the original) and ``score``; or the object of a data set, whose ``images`` may be without any box.
A .npz file holds the same exactly and in a quarter of the space: ``file_names`` (M,) and ``image_ids`` (M,) int64,
``counts`` (M,) int64, ``boxes`` (T, 4) float32 x1 y1 x2 y2 and ``scores`` (T,) float32, image by image.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fpn_engine.detections import shortest_floats
from fpn_engine.errors import ProposalError
from fpn_engine.files import replacing
from fpn_engine.proposals import ProposalBoxes, ProposedImage, as_boxes
from fpn_engine.results import as_image_id
from fpn_engine.spec_json import finite_number

SUFFIXES = (".json", ".npz")
ARRAYS = ("file_names", "image_ids", "counts", "boxes", "scores")


class _Key(NamedTuple):
    file_name: str | None
    image_id: int | str | None


def check_suffix(path: Path) -> None:
    """Raise ProposalError unless ``path`` is named as a proposal file."""
    if path.suffix not in SUFFIXES:
        raise ProposalError(f"{path} is no proposal file by its name; it ends in {' or '.join(SUFFIXES)}")


def load_proposals(path: Path) -> list[ProposedImage]:
    """The proposals of each image in a file, best first, equal scores in the file's order.

    Raises: ProposalError, one sentence, for a file that cannot be read or holds anything else.
    """
    check_suffix(path)
    try:
        return _read_npz(path) if path.suffix == ".npz" else _read_json(path)
    except OSError as error:
        raise ProposalError(f"cannot read the proposals {path}: {error.strerror or error}") from None
    except KeyError as error:
        raise ProposalError(f"the proposals {path} have no {error}") from None
    except (TypeError, ValueError, OverflowError, RecursionError, EOFError, zipfile.BadZipFile, ProposalError) as error:
        raise ProposalError(f"the proposals {path} are not of the right form: {error}") from None


def save_proposals(path: Path, images: Iterable[ProposedImage]) -> None:
    """Write a file that :func:`load_proposals` reads, whole or not at all. In JSON sides are rounded to float32."""
    check_suffix(path)
    images = list(images)
    with replacing(path) as temporary:
        if path.suffix == ".npz":
            with temporary.open("wb") as file:
                _write_npz(file, images)
        else:
            with temporary.open("w", encoding="utf-8") as file:
                json.dump(_to_coco(images), file, allow_nan=False)


def _read_json(path: Path) -> list[ProposedImage]:
    data = json.loads(path.read_text(encoding="utf-8-sig"))
    names: dict[Any, str] = {}
    if isinstance(data, Mapping):
        names = {_as_id(entry["id"]): str(entry["file_name"]) for entry in data["images"]}
        data = data["annotations"]
    if not isinstance(data, Sequence) or not all(isinstance(entry, Mapping) for entry in data):
        raise ValueError("it is no list of objects")
    found: dict[_Key, list[tuple[float, ...]]] = {_Key(name, image_id): [] for image_id, name in names.items()}
    for entry in data:
        x, y, width, height = map(finite_number, entry["bbox"])
        score = finite_number(entry.get("score", 1.0))
        found.setdefault(_key_of(entry, names), []).append((x, y, x + width, y + height, score))
    return [_make_image(key, np.array(rows, dtype=np.float32).reshape(-1, 5)) for key, rows in found.items()]


def _key_of(entry: Mapping[str, Any], names: Mapping[Any, str]) -> _Key:
    image_id, file_name = _as_id(entry.get("image_id")), entry.get("file_name")
    if image_id is None and file_name is None:
        raise KeyError("image_id")
    if names and file_name is None and image_id not in names:
        raise ValueError(f"a box is on image {image_id!r}, which is not listed")
    return _Key(names.get(image_id) if file_name is None else str(file_name), image_id)


def _as_id(value: Any) -> Any:
    return as_image_id(value) if isinstance(value, str) else value


def _read_npz(path: Path) -> list[ProposedImage]:
    if not zipfile.is_zipfile(path):  # numpy would take it for a pickle, and say how to load that
        path.stat()
        raise ValueError("it is no .npz archive, or a damaged one")
    with np.load(path, allow_pickle=False) as archive:
        names, ids, counts, boxes, scores = (archive[name] for name in ARRAYS)
    fit = len(names) == len(ids) == len(counts) and len(boxes) == len(scores) == counts.sum()
    if not fit or (counts < 0).any() or boxes.shape[1:] != (4,):
        raise ValueError("its arrays do not fit each other")
    rows = np.hstack([boxes, scores[:, None]]).astype(np.float32)
    ends = counts.cumsum()
    return [
        _make_image(_Key(str(name), int(image_id)), rows[end - count : end])
        for name, image_id, count, end in zip(names, ids, counts, ends, strict=True)
    ]


def _make_image(key: _Key, rows: NDArray[np.float32]) -> ProposedImage:
    """``rows`` (n, 5): x1, y1, x2, y2, score."""
    if not np.isfinite(rows[:, 4]).all():
        raise ValueError("a score is not a finite number")
    rows = rows[np.argsort(-rows[:, 4], kind="stable")]
    (boxes,) = as_boxes([rows[:, :4]], 1)
    return ProposedImage(
        file_name=key.file_name, image_id=key.image_id, proposals=ProposalBoxes(boxes, rows[:, 4].copy())
    )


def _write_npz(file: BinaryIO, images: Sequence[ProposedImage]) -> None:
    none = ProposalBoxes(np.zeros((0, 4), np.float32), np.zeros(0, np.float32))
    found = [none, *(image.proposals for image in images)]
    np.savez(
        file,
        file_names=np.array([image.file_name for image in images], dtype=np.str_),
        image_ids=np.array([image.image_id for image in images], dtype=np.int64),
        counts=np.array([len(image.proposals.boxes) for image in images], dtype=np.int64),
        boxes=np.concatenate([proposals.boxes for proposals in found]),
        scores=np.concatenate([proposals.scores for proposals in found]),
    )


def _to_coco(images: Sequence[ProposedImage]) -> dict[str, Any]:
    annotations = []
    for image in images:
        boxes, scores = image.proposals
        bboxes = shortest_floats(np.hstack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]]))
        annotations += [
            {"image_id": image.image_id, "bbox": bbox, "score": score}
            for bbox, score in zip(bboxes, shortest_floats(scores), strict=True)
        ]
    listed = [{"id": image.image_id, "file_name": image.file_name} for image in images]
    return {"images": listed, "annotations": annotations}

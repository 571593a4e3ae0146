"""Results as machines read them: JSON, JSON Lines and COCO, written image by image."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any, Protocol, TextIO

import numpy as np

from fpn_engine.detections import Detections, shortest_floats
from fpn_engine.errors import AnnotationError, FpnEngineError

FORMATS = ("json", "jsonl", "coco")
_RECORD_START = b'{"image": "'
_HELD = (signal.SIGINT, signal.SIGTERM)


class Writer(Protocol):
    """Writes one image after the other. ``close`` ends the document, also after an interrupt; not the stream."""

    def write(self, detections: Detections) -> None: ...

    def write_error(self, source: str, message: str) -> None: ...

    def close(self) -> None: ...


def open_writer(format: str, stream: TextIO, *, image_ids: Mapping[str, int] | None = None) -> Writer:
    """Begin a results document on ``stream``.

    Args:
        format: "json", an array of one object per image; "jsonl", one such object per line; "coco", the
            results array of the COCO tools.
        stream: open for writing text. What is written is pure ASCII, flushed after every image; nothing is
            held back, so that any number of images may follow.
        image_ids: for "coco", the annotation file's id of each file_name; see :class:`CocoWriter`.
    Raises: FpnEngineError for an unknown format, and when ``write`` cannot write (a full disk); a closed
        pipe stays a BrokenPipeError, which usually is no mistake.
    """
    if format == "json":
        return JsonWriter(stream)
    if format == "jsonl":
        return JsonLinesWriter(stream)
    if format == "coco":
        return CocoWriter(stream, image_ids)
    raise FpnEngineError(f"unknown results format {format!r}; use one of {', '.join(FORMATS)}")


class JsonLinesWriter:
    """One object per image and line: ``{"image", "height", "width", "detections"}`` or ``{"image", "error"}``."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, detections: Detections) -> None:
        _write(self._stream, _to_json(detections.to_dict()) + "\n")

    def write_error(self, source: str, message: str) -> None:
        _write(self._stream, _to_json({"image": source, "error": message}) + "\n")

    def close(self) -> None:
        pass  # every line is complete


class JsonWriter:
    """The objects of JSON Lines in one array, a line each, in the order of the images."""

    def __init__(self, stream: TextIO) -> None:
        self._array = _Array(stream)

    def write(self, detections: Detections) -> None:
        self._array.extend([detections.to_dict()])

    def write_error(self, source: str, message: str) -> None:
        self._array.extend([{"image": source, "error": message}])

    def close(self) -> None:
        self._array.close()


class CocoWriter:
    """COCO results: ``{"image_id", "category_id", "bbox": [x, y, w, h], "score", "file_name"}`` each.

    The image id is the annotation file's id of the path or of its longest ending that is listed there. Without
    annotations it is the file name's stem, as a number if it is one ("000000000139.jpg" is 139), else as text,
    never a running number: that would change with the folder. Errors have no place in this format.

    Raises: AnnotationError for an image that has no id: not listed, no name, or the id of another image.
    """

    def __init__(self, stream: TextIO, image_ids: Mapping[str, int] | None) -> None:
        self._array = _Array(stream)
        self._image_ids = image_ids
        self._sources: dict[int | str, str] = {}

    def write(self, detections: Detections) -> None:
        if detections.source is None:
            raise AnnotationError("COCO results need images with file names; write JSON instead")
        image_id = find_image_id(detections.source, self._image_ids)
        known = self._sources.setdefault(image_id, detections.source)
        if known != detections.source:
            raise AnnotationError(
                f"{detections.source!r} and {known!r} would share the COCO image id {image_id!r}; "
                "give the annotation file that tells them apart"
            )
        file_name = PurePath(detections.source).name
        self._array.extend([{**result, "file_name": file_name} for result in coco_results(detections, image_id)])

    def write_error(self, source: str, message: str) -> None:
        pass

    def close(self) -> None:
        self._array.close()


def coco_results(detections: Detections, image_id: int | str) -> list[dict[str, Any]]:
    """The COCO results of one image: boxes as x, y, width, height in pixels of the original, and masks if there are."""
    corners = detections.boxes
    bboxes = shortest_floats(np.hstack([corners[:, :2], corners[:, 2:] - corners[:, :2]]))
    scores = shortest_floats(detections.scores)
    results: list[dict[str, Any]] = [
        {"image_id": image_id, "category_id": category_id, "bbox": bbox, "score": score}
        for category_id, bbox, score in zip(detections.category_ids.tolist(), bboxes, scores, strict=True)
    ]
    for result, mask in zip(results, detections.run_lengths or (), strict=detections.run_lengths is not None):
        result["segmentation"] = dict(mask)
    return results


def as_image_id(text: str) -> int | str:
    """The number that a text of digits stands for, as ids are written in some files; other texts as they are."""
    return int(text) if text.isascii() and text.isdigit() else text


def find_image_id(source: str, image_ids: Mapping[str, int] | None) -> int | str:
    """The COCO id of the image at path ``source``; the rule stands at :class:`CocoWriter`."""
    path = PurePath(source)
    if image_ids is None:
        return as_image_id(path.stem)
    for start in range(len(path.parts)):
        image_id = image_ids.get(PurePath(*path.parts[start:]).as_posix())
        if image_id is not None:
            return image_id
    raise AnnotationError(f"the annotations do not list the image {source!r}; give the file that belongs to it")


def completed_images(path: str | Path) -> set[str]:
    """The images that a JSON Lines file holds detections of; to be skipped when the run is resumed.

    A last line without its end, left by an interrupt, does not count; :func:`cut_partial_line` removes it.
    Images with an error do not count either: they are tried again, and their last line is the valid one.

    Returns: the values of "image"; empty if there is no such file.
    Raises: FpnEngineError if the file cannot be read or is not one of ours.
    """
    images: set[str] = set()
    if os.path.exists(path) and not os.path.isfile(path):
        raise FpnEngineError(f"cannot resume {path}: it is not a regular file")
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                ours = line[: len(_RECORD_START)] == _RECORD_START[: len(line)]
                if not line.endswith(b"\n") and (ours or number > 1):
                    break
                record = _parse_line(line)
                if record is None:
                    raise FpnEngineError(
                        f"cannot resume {path}: line {number} is not a result of this program; "
                        "remove the line or choose another output"
                    )
                if "error" not in record:
                    images.add(record["image"])
    except FileNotFoundError:
        pass
    except OSError as error:
        raise FpnEngineError(f"cannot resume {path}: {error.strerror}") from error
    return images


def cut_partial_line(path: str | Path) -> None:
    """Cut off what follows the last newline of a file, in place, so that whole lines can be appended."""
    try:
        with open(path, "r+b") as file:
            end = 0
            for line in file:
                if line.endswith(b"\n"):
                    end += len(line)
            file.truncate(end)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise FpnEngineError(f"cannot resume {path}: {error.strerror}") from error


def _parse_line(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("image"), str) else None


class _Array:
    """A JSON array that grows on a stream, a line per element; valid once closed, at whatever moment."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._before = "\n"
        self._closed = False
        self._append("[")

    def extend(self, elements: Sequence[Any]) -> None:
        if elements:  # all in one write, the comma first: before it and after it, close() completes the array
            self._append(self._before + ",\n".join(_to_json(element) for element in elements))
            self._before = ",\n"

    def close(self) -> None:
        if not self._closed:
            self._append("\n]\n")
            self._closed = True

    def _append(self, text: str) -> None:
        try:
            _write(self._stream, text)
        except (FpnEngineError, OSError):
            self._closed = True  # close() from a finally must not hide this error behind a second one
            raise


def _to_json(value: Any) -> str:
    return json.dumps(value, allow_nan=False)


def _write(stream: TextIO, text: str) -> None:
    try:
        with _hold_interrupt():
            stream.write(text)
            stream.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise FpnEngineError(
            f"cannot write the results: {error.strerror}; free some space or choose another output"
        ) from error


@contextmanager
def _hold_interrupt() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait until a record is written: Python may drop half of a write it interrupts."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals only reach the main thread
        return
    held: list[int] = []
    handlers = [signal.signal(number, lambda number, frame: held.append(number)) for number in _HELD]
    try:
        yield
    finally:
        for number, handler in zip(_HELD, handlers, strict=True):
            signal.signal(number, handler)
        if held:
            signal.raise_signal(held[0])

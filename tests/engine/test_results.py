import contextlib
import io
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fpn_engine.detections import Detections, shortest_floats
from fpn_engine.errors import AnnotationError, FpnEngineError
from fpn_engine.results import FORMATS, completed_images, cut_partial_line, open_writer
from fpn_engine.spec import Category

CATEGORIES = (Category(id=7, name="cell"), Category(id=90, name='a "b"\nc é'))
ODD_NAME = "new\nline \udcff 血.jpg"  # \udcff: how Python reads a file name that is not UTF-8


def make_detections(source: str | None, count: int = 2) -> Detections:
    return Detections(
        boxes=np.tile(np.array([0.1, 20.5, 30.3, 40.7], np.float32), (count, 1)),
        scores=np.linspace(0.98, 0.5, count, dtype=np.float32),
        labels=np.arange(count, dtype=np.int64) % 2 + 1,
        image_size=(480, 640),
        categories=CATEGORIES,
        source=source,
    )


def write_all(format: str, *sources: str | None, **options: dict[str, int]) -> str:
    stream = io.StringIO()
    writer = open_writer(format, stream, **options)
    for source in sources:
        writer.write(make_detections(source))
    writer.close()
    return stream.getvalue()


def test_json_is_an_array_of_images() -> None:
    text = write_all("json", "a.jpg", ODD_NAME)
    first, second = json.loads(text)
    assert first == {
        "image": "a.jpg",
        "height": 480,
        "width": 640,
        "detections": [
            {"category_id": 7, "name": "cell", "score": 0.98, "box": [0.1, 20.5, 30.3, 40.7]},
            {"category_id": 90, "name": 'a "b"\nc é', "score": 0.5, "box": [0.1, 20.5, 30.3, 40.7]},
        ],
    }
    assert second["image"] == ODD_NAME
    assert text.isascii()
    assert text.count("\n") == 4  # brackets and one line per image


def test_json_lines_are_the_same_objects_one_per_line() -> None:
    lines = write_all("jsonl", "a.jpg", ODD_NAME).splitlines()
    assert [json.loads(line) for line in lines] == json.loads(write_all("json", "a.jpg", ODD_NAME))


def test_coco_results_hold_width_and_height_and_the_data_sets_ids() -> None:
    first, second = json.loads(write_all("coco", "folder/000000000139.jpg"))
    assert first == {
        "image_id": 139,
        "category_id": 7,
        "bbox": [0.1, 20.5, 30.199999, 20.2],
        "score": 0.98,
        "file_name": "000000000139.jpg",
    }
    assert second["category_id"] == 90


@pytest.mark.parametrize(
    ("source", "image_ids", "expected"),
    [
        ("folder/cell_1.jpg", None, "cell_1"),
        ("folder/²3.jpg", None, "²3"),
        ("/data/val/cell_1.jpg", {"cell_1.jpg": 5}, 5),
        ("/data/val/1.jpg", {"1.jpg": 5, "val/1.jpg": 6, "train/1.jpg": 7}, 6),
        ("1.jpg", {"1.jpg": 0}, 0),
    ],
)
def test_coco_image_ids(source: str, image_ids: dict[str, int] | None, expected: int | str) -> None:
    assert json.loads(write_all("coco", source, image_ids=image_ids))[0]["image_id"] == expected


@pytest.mark.parametrize(
    ("sources", "image_ids", "message"),
    [
        (("b.jpg",), {"a.jpg": 1}, "do not list the image 'b.jpg'"),
        (("x/1.jpg", "y/1.jpg"), None, "'y/1.jpg' and 'x/1.jpg' would share the COCO image id 1"),
        ((None,), None, "need images with file names"),
    ],
)
def test_coco_refuses_images_that_cannot_be_told_apart(
    sources: tuple[str | None, ...], image_ids: dict[str, int] | None, message: str
) -> None:
    with pytest.raises(AnnotationError, match=message):
        write_all("coco", *sources, image_ids=image_ids)


def test_errors_stand_between_the_images_except_in_coco() -> None:
    for format, expected in (("json", {"image": "b\n.jpg", "error": "broken"}), ("coco", None)):
        stream = io.StringIO()
        writer = open_writer(format, stream)
        writer.write_error("b\n.jpg", "broken")
        writer.write(make_detections("1.jpg", count=1))
        writer.close()
        document = json.loads(stream.getvalue())
        assert len(document) == (2 if expected else 1)
        assert expected is None or document[0] == expected


@pytest.mark.parametrize(("format", "expected"), [("json", []), ("coco", []), ("jsonl", None)])
def test_a_document_without_images_parses(format: str, expected: object) -> None:
    text = write_all(format)
    assert (json.loads(text) if text else None) == expected


def test_coco_with_images_without_detections_parses() -> None:
    stream = io.StringIO()
    writer = open_writer("coco", stream)
    for count in (0, 1, 0, 2):
        writer.write(make_detections(f"{count}.jpg", count))
    writer.close()
    writer.close()
    assert [entry["image_id"] for entry in json.loads(stream.getvalue())] == [1, 2, 2]


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(FpnEngineError, match="unknown results format 'xml'; use one of json, jsonl, coco"):
        open_writer("xml", io.StringIO())


@pytest.mark.parametrize("format", FORMATS)
def test_each_image_reaches_the_file_at_once(tmp_path: Path, format: str) -> None:
    path = tmp_path / "results"
    with open(path, "w") as stream:
        writer = open_writer(format, stream)
        writer.write(make_detections("1.jpg"))
        assert path.read_text().count("category_id") == 2


class InterruptedStream(io.StringIO):
    """A signal arrives in the middle of the second image's write."""

    number = signal.SIGINT

    def write(self, text: str) -> int:
        super().write(text[: len(text) // 2])
        if '"2.jpg"' in text:
            signal.raise_signal(self.number)
        return super().write(text[len(text) // 2 :])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("format", FORMATS)
def test_an_interrupt_leaves_a_document_that_parses(format: str, number: signal.Signals) -> None:
    stream = InterruptedStream()
    stream.number = number
    previous = signal.signal(number, signal.default_int_handler)
    try:
        with contextlib.closing(open_writer(format, stream)) as writer:
            writer.write(make_detections("1.jpg"))
            with pytest.raises(KeyboardInterrupt):
                writer.write(make_detections("2.jpg"))
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, previous)
    text = stream.getvalue()
    records = [json.loads(line) for line in text.splitlines()] if format == "jsonl" else json.loads(text)
    assert len(records) == (4 if format == "coco" else 2)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_is_said_plainly(format: str) -> None:
    stream = open("/dev/full", "w")  # noqa: SIM115 - closing it fails as well
    with pytest.raises(FpnEngineError, match="cannot write the results: No space left on device"):
        open_writer(format, stream).write(make_detections("1.jpg"))
    with pytest.raises(OSError, match="No space left"):
        stream.close()


def test_a_write_that_failed_is_not_followed_by_another_error_from_close() -> None:
    class FullStream(io.StringIO):
        def write(self, text: str) -> int:
            if "1.jpg" in text:
                raise OSError(28, "No space left on device")
            assert text == "[", "nothing may be written after a failure"
            return super().write(text)

    with (
        pytest.raises(FpnEngineError, match="No space left"),
        contextlib.closing(open_writer("json", FullStream())) as w,
    ):
        w.write(make_detections("1.jpg"))


def test_a_closed_pipe_stays_a_broken_pipe() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    stream = os.fdopen(writing, "w")
    with pytest.raises(BrokenPipeError):
        open_writer("jsonl", stream).write(make_detections("1.jpg"))
    with pytest.raises(BrokenPipeError):
        stream.close()


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_numbers_are_short_and_exact(values: list[float]) -> None:
    array = np.array(values, np.float32)
    shortest = shortest_floats(array)
    assert np.array_equal(np.array(shortest, np.float32), array)
    assert all(len(repr(number)) <= len(repr(float(value))) for number, value in zip(shortest, array, strict=True))


def test_numbers_of_no_detections_keep_their_form() -> None:
    assert shortest_floats(np.zeros((0, 4), np.float32)) == []


@pytest.fixture
def lines_file(tmp_path: Path) -> Path:
    path = tmp_path / "results.jsonl"
    with open(path, "w") as stream:
        writer = open_writer("jsonl", stream)
        writer.write(make_detections("a.jpg"))
        writer.write_error("b.jpg", "broken")
        writer.write(make_detections(ODD_NAME, 0))
    return path


def test_completed_images_are_those_with_detections(lines_file: Path, tmp_path: Path) -> None:
    assert completed_images(lines_file) == {"a.jpg", ODD_NAME}
    assert completed_images(tmp_path / "none.jsonl") == set()


@pytest.mark.parametrize("rest", [b'{"image": "c.jpg", "dete', b'{"image": "c.jpg", "detections": []}', b"\xff\x00"])
def test_a_partial_last_line_does_not_count_and_is_cut(lines_file: Path, rest: bytes) -> None:
    whole = lines_file.read_bytes()
    lines_file.write_bytes(whole + rest)
    assert completed_images(lines_file) == {"a.jpg", ODD_NAME}
    cut_partial_line(lines_file)
    assert lines_file.read_bytes() == whole


def test_cutting_a_file_of_one_partial_line_or_none(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    cut_partial_line(path)
    assert not path.exists()
    path.write_text('{"image"')
    cut_partial_line(path)
    assert path.read_bytes() == b""


@pytest.mark.parametrize("line", ["[1]", "hello", '{"name": 1}', '{"image": null, "detections": []}'])
def test_other_files_are_not_resumed(lines_file: Path, line: str) -> None:
    with open(lines_file, "a") as file:
        file.write(line + "\n")
    with pytest.raises(FpnEngineError, match=r"cannot resume .*results\.jsonl: line 4 is not a result"):
        completed_images(lines_file)


@pytest.mark.parametrize("read", [completed_images, cut_partial_line])
def test_a_folder_cannot_be_resumed(tmp_path: Path, read: Callable[[Path], object]) -> None:
    with pytest.raises(FpnEngineError, match=r"cannot resume .*: (Is a directory|it is not a regular file)"):
        read(tmp_path)

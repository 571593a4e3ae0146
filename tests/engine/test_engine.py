"""The engine from Python: every kind of image, alone and in company, and what it refuses."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fpn_engine.detections import Detections
from fpn_engine.engine import Engine
from fpn_engine.errors import FpnEngineError, ImageError, NonFiniteError, OptionError, PlanError
from fpn_engine.plan import read_plan
from tests.engine.conftest import SPEC, Pixels, Tiny, make_picture, save_picture

# Two share a padded size, two others have extreme shapes.
SHAPES = [(60, 80), (61, 79), (90, 50), (200, 40), (1, 1), (60, 80)]
PIXELS, SCORE = 1e-3, 1e-4


@pytest.fixture(scope="module")
def pictures() -> list[Pixels]:
    return [make_picture(*shape, seed) for seed, shape in enumerate(SHAPES)]


def assert_same(actual: Detections, expected: Detections) -> None:
    """Bit for bit."""
    assert len(actual) > 0
    for name in ("boxes", "scores", "labels"):
        np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name))
    assert actual.image_size == expected.image_size


def assert_twins(actual: Detections, expected: Detections, threshold: float) -> None:
    """Each detection clearly above ``threshold`` has a twin on the other side."""
    for ours, theirs in ((actual, expected), (expected, actual)):
        assert (ours.scores > threshold + 1e-3).sum() > 0
        for box, score, label in zip(ours.boxes, ours.scores, ours.labels, strict=True):
            twins = (abs(theirs.boxes - box).max(axis=1) < PIXELS) & (abs(theirs.scores - score) < SCORE)
            assert score <= threshold + 1e-3 or (twins & (theirs.labels == label)).any()


def test_arrays_pictures_tensors_and_paths_give_the_same(engine: Engine, tmp_path: Path) -> None:
    path = save_picture(tmp_path / "a.png")
    pixels = make_picture(60, 80)
    tensor = torch.from_numpy(pixels)
    expected = engine(pixels)[0]
    given = [Image.open(path), tensor, tensor.permute(2, 0, 1), path, str(path)]
    for found in engine(given):
        assert_same(found, expected)
    assert [found.source for found in engine(given)] == [None, None, None, str(path), str(path)]


def test_detections_are_what_they_promise(engine: Engine, pictures: list[Pixels]) -> None:
    for found, picture in zip(engine(pictures), pictures, strict=True):
        h, w = picture.shape[:2]
        assert 1 <= len(found) <= SPEC.box_detections_per_img
        assert found.boxes.dtype == found.scores.dtype == np.float32
        assert found.labels.dtype == np.int64
        assert (np.diff(found.scores) <= 0).all()
        assert (found.scores > SPEC.box_score_thresh).all()
        assert found.image_size == (h, w)
        assert (found.boxes[:, :2] >= 0).all()
        assert (found.boxes[:, 2:] <= np.array([w, h]) * (1 + 1e-6)).all()
        assert set(found.names) <= {"cat", "dog", "bird"}
    assert len({name for found in engine(pictures) for name in found.names}) > 1


def test_one_image_is_a_list_of_one(engine: Engine, pictures: list[Pixels]) -> None:
    (alone,) = engine(pictures[0])
    assert_same(alone, engine([pictures[0]])[0])
    assert engine([]) == []


@pytest.mark.parametrize("batch_size", [2, 4])
def test_company_changes_nothing(batch_size: int, tiny: Tiny, engine: Engine, pictures: list[Pixels]) -> None:
    batched = Engine.load(tiny.plan, batch_size=batch_size)
    threshold = 0.3
    together = batched(pictures, score_threshold=threshold, max_detections=1000)
    for picture, found in zip(pictures, together, strict=True):
        assert_twins(found, engine(picture, score_threshold=threshold, max_detections=1000)[0], threshold)


def test_the_same_call_gives_the_same_bits(engine: Engine, pictures: list[Pixels]) -> None:
    first = engine(pictures)
    for _ in range(2):
        for found, expected in zip(engine(pictures), first, strict=True):
            assert_same(found, expected)


def test_thresholds(engine: Engine, pictures: list[Pixels]) -> None:
    (everything,) = engine(pictures[0], score_threshold=0.0, nms_threshold=1.0, max_detections=1000)
    (default,) = engine(pictures[0])
    (high,) = engine(pictures[0], score_threshold=0.8)
    (apart,) = engine(pictures[0], nms_threshold=0.0)
    (nothing,) = engine(pictures[0], score_threshold=1.0)
    assert len(everything) > len(default) > len(high) > 0
    assert high.scores.min() > 0.8
    for label in set(apart.labels.tolist()):
        boxes = apart.boxes[apart.labels == label]
        corners = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:]) - np.maximum(boxes[:, None, :2], boxes[:, :2])
        assert np.count_nonzero(corners.clip(0).prod(axis=2) > 1e-3) == len(boxes)  # each meets only itself
    assert_same(engine(pictures[0], max_detections=3)[0], default.best(3))
    assert (len(nothing), nothing.boxes.shape, nothing.boxes.dtype) == (0, (0, 4), np.float32)


@pytest.mark.parametrize(
    "wrong", [{"score_threshold": 2.0}, {"score_threshold": float("nan")}, {"nms_threshold": -1}, {"max_detections": 0}]
)
def test_thresholds_out_of_range(wrong: dict[str, float], engine: Engine, pictures: list[Pixels]) -> None:
    with pytest.raises(ValueError, match="must be"):
        engine(pictures[0], **wrong)  # type: ignore[arg-type]


def test_a_bad_image_is_named(engine: Engine, pictures: list[Pixels], tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"^image 1: an array of float64"):
        engine([pictures[0], pictures[0] / 255])
    with pytest.raises(ImageError, match=r"^an array of float64"):
        engine(pictures[0] / 255)
    with pytest.raises(ImageError, match=r"^'.*missing\.jpg' does not exist"):
        engine([pictures[0], tmp_path / "missing.jpg"])
    with pytest.raises(ImageError, match="not NoneType"):
        engine(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_stream_goes_on_after_bad_files(batch_size: int, tiny: Tiny, engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    sizes = {"a.png": (60, 80), "b.png": (90, 50), "c.png": (60, 80), "d.png": (1, 1)}
    for seed, (name, size) in enumerate(sizes.items()):
        save_picture(tmp_path / name, *size, seed)
    paths = [tmp_path / name for name in ("a.png", "bad.png", "b.png", "missing.png", "c.png", "d.png")]
    outcomes = list(Engine.load(tiny.plan, batch_size=batch_size).stream(iter(paths)))
    assert [outcome.source for outcome in outcomes] == [str(path) for path in paths]
    for outcome in outcomes:
        name = Path(outcome.source).name
        if name in sizes:
            assert isinstance(outcome.result, Detections)
            assert outcome.pixels is not None
            assert outcome.result.source == outcome.source
            assert outcome.result.image_size == outcome.pixels.shape[:2] == sizes[name]
            assert_twins(outcome.result, engine(outcome.source)[0], outcome.result.scores.min())
        else:
            assert isinstance(outcome.result, ImageError)
            assert outcome.pixels is None


def test_stream_of_one_path(engine: Engine, tmp_path: Path) -> None:
    (outcome,) = engine.stream(str(tmp_path / "missing.png"))
    assert "does not exist" in str(outcome.result)
    (outcome,) = engine.stream(tmp_path)
    assert "is a folder" in str(outcome.result)


def test_stream_reads_only_as_far_as_it_must(engine: Engine, tmp_path: Path) -> None:
    path = save_picture(tmp_path / "a.png")
    endless = iter(lambda: path, None)
    stream = engine.stream(endless)
    assert next(stream).source == next(stream).source == str(path)


def test_proposals(engine: Engine, pictures: list[Pixels]) -> None:
    for found, picture in zip(engine.propose(pictures), pictures, strict=True):
        h, w = picture.shape[:2]
        assert 1 <= len(found.boxes) == len(found.scores) <= SPEC.rpn_post_nms_top_n_test
        assert (np.diff(found.scores) <= 0).all()
        assert (found.boxes >= 0).all()
        assert (found.boxes[:, 2:] <= np.array([w, h]) * (1 + 1e-6)).all()
    assert engine.propose([]) == []


def test_proposals_are_in_pixels_of_the_original(engine: Engine) -> None:
    small = make_picture(60, 80)
    (near,), (far,) = engine.propose(small), engine.propose(small.repeat(2, axis=0).repeat(2, axis=1))
    assert near.boxes[:, 2].max() > 70
    assert far.boxes[:, 2].max() > 140


def test_not_a_number_is_an_error_and_no_empty_list(broken_plan: Path, tmp_path: Path) -> None:
    broken = Engine.load(broken_plan)
    path = save_picture(tmp_path / "a.png")
    with pytest.raises(NonFiniteError, match=r"^image 0: the network gave NaN or infinity; check the checkpoint"):
        broken.propose(make_picture(60, 80))
    with pytest.raises(NonFiniteError, match=r"^.*a\.png: the network gave NaN"):
        broken(path)
    (outcome,) = broken.stream([path])
    assert isinstance(outcome.result, NonFiniteError)
    assert str(outcome.result).startswith(str(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "openvino"}, "is for openvino fp32 on cpu"),
        ({"precision": "fp16"}, "fp16"),
        ({"device": "cuda"}, "on cuda"),
        ({"versions": {"onnxruntime": "0.1.0"}}, r"built with onnxruntime 0\.1\.0, installed is"),
        ({"versions": {}}, "built with onnxruntime none"),
    ],
)
def test_a_plan_for_something_else(change: dict[str, object], message: str, tiny: Tiny) -> None:
    plan = read_plan(tiny.plan)
    manifest = dataclasses.replace(plan.manifest, **change)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=f"{message}.*; build it again with: fpn-engine build tiny.onnx"):
        Engine.from_plan(dataclasses.replace(plan, manifest=manifest))


def test_loading(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"there is no plan .*; make one with: fpn-engine build"):
        Engine.load(tmp_path / "missing.plan")
    with pytest.raises(PlanError, match="is not a plan or is damaged"):
        Engine.load(tiny.model)
    with pytest.raises(OptionError, match="batch_size must be a whole number from 1 on, not 0"):
        Engine.load(tiny.plan, batch_size=0)
    assert issubclass(PlanError, FpnEngineError)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"batchsize": 4}, TypeError, "not loaded with 'batchsize'; there are batch_size, threads"),
        ({"batch_size": 2.5}, OptionError, "batch_size must be a whole number from 1 on, not 2.5"),
        ({"threads": 0}, OptionError, "threads must be a whole number from 1 on, not 0"),
        ({"threads": "a"}, OptionError, "threads must be .* not 'a'"),
        ({"streams": True}, OptionError, "streams must be .* not True"),
        ({"batch_size": None}, OptionError, "batch_size must be .* not None"),
        ({"images": -1}, OptionError, "images must be a whole number from 0 on, not -1"),
        ({"images": "x"}, OptionError, "images must be .* not 'x'"),
        ({"graph_memory": 1.5}, OptionError, "graph_memory must be .* not 1.5"),
        ({"graphs": "x"}, OptionError, "graphs must be True or False, not 'x'"),
        ({"device": 0}, OptionError, "device must be a name such as 'cpu' or 'cuda:1', not 0"),
        ({"device": torch.device("cpu")}, OptionError, "device must be a name"),
    ],
)
def test_options_that_are_none(options: dict[str, Any], error: type[Exception], words: str, tiny: Tiny) -> None:
    with pytest.raises(error, match=words):
        Engine.load(tiny.plan, **options)


def test_arguments_that_are_none(engine: Engine, pictures: list[Pixels]) -> None:
    with pytest.raises(OptionError, match=r"sizes must be of pixels from 1 on, not \(0, 640\)"):
        engine.warmup([(0, 640)])
    with pytest.raises(ValueError, match=r"must be at least 1 and a whole number, not 2\.5"):
        engine(pictures[0], max_detections=2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be at most 100000, not 1000000000"):
        engine(pictures[0], max_detections=10**9)


def test_one_class_by_its_name(engine: Engine, pictures: list[Pixels]) -> None:
    (found,) = engine(pictures[0])
    assert found.filter(classes="dog").to_dict() == found.filter(classes=["dog"]).to_dict()
    assert 0 < len(found.filter(classes="dog")) < len(found)


@pytest.mark.filterwarnings("error")
def test_an_array_of_a_pillow_image_is_read_only(engine: Engine, pictures: list[Pixels]) -> None:
    array = np.asarray(Image.fromarray(pictures[0]))
    assert not array.flags.writeable
    assert engine(array)[0].to_dict() == engine(pictures[0])[0].to_dict()

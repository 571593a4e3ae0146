"""``decode="gpu"`` and ``--decode gpu`` from file to detections, with stand-ins for the decoder and the GPU."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fpn_engine.detections import Detections
from fpn_engine.engine import Engine
from fpn_engine.errors import BackendError, FpnEngineError, ImageError, OptionError
from fpn_engine.plan import Plan, read_plan
from fpn_engine.runtime import device_reader
from fpn_engine.runtime.captured import CapturedRunner
from fpn_export.detector import FpnDetector
from tests.engine.conftest import Run, Tiny, make_picture
from tests.engine.dataset import annotate
from tests.engine.image_files import ORIENTATION_TAG
from tests.engine.runtime.conftest import fixed
from tests.engine.runtime.jpeg_stand_ins import RecordingDecoder
from tests.engine.runtime.stand_ins import DeferredTransport, RecordingCapture
from tests.engine.test_engine import assert_same

SHAPES = [(60, 80), (61, 79), (90, 50), (60, 80), (200, 40), (61, 79)]


@pytest.fixture
def decoder() -> RecordingDecoder:
    return RecordingDecoder()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """JPEG, one on its side, and others between them: PNG, CMYK, one broken off, and text."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = 6
    for number, (h, w) in enumerate(SHAPES):
        picture = Image.fromarray(make_picture(h, w, number))
        picture.save(folder / f"{number}.jpg", quality=95, **({"exif": exif} if number == 1 else {}))
    Image.fromarray(make_picture(60, 80, 7)).save(folder / "2b.png")
    Image.fromarray(make_picture(60, 80, 8)).convert("CMYK").save(folder / "3b.jpg")
    (folder / "4b.jpg").write_bytes((folder / "4.jpg").read_bytes()[:-20])
    (folder / "5b.jpg").write_text("words")
    return folder


@pytest.mark.usefixtures("atomic_ops")
@pytest.mark.parametrize("early", [False, True])
def test_files_to_detections_without_the_host(
    early: bool, model: FpnDetector, decoder: RecordingDecoder, folder: Path
) -> None:
    transport = DeferredTransport(early_uploads=early)
    runner = CapturedRunner(fixed(model), transport, RecordingCapture(transport), batch_size=1, graph_memory=10**9)
    engine = Engine(fixed(model), runner=runner, read=decoder.reader)
    plain = Engine(fixed(model))
    paths = sorted(folder.iterdir())
    for _ in range(3):  # operation by operation, captured, replayed
        for path, outcome, expected in zip(paths, engine.stream(paths), plain.stream(paths), strict=True):
            if path.stem in ("4b", "5b"):
                assert isinstance(outcome.result, ImageError)
                assert str(outcome.result) == str(expected.result)
                continue
            assert isinstance(outcome.result, Detections)
            assert isinstance(expected.result, Detections)
            assert_same(outcome.result, expected.result)
            assert isinstance(outcome.pixels, np.ndarray if path.stem in ("2b", "3b") else torch.Tensor)
    assert transport.log.count("place") == 3 * len(SHAPES)
    assert len(decoder.given) == 3 * len(SHAPES)


def test_calls_and_proposals_read_files_so_too(model: FpnDetector, decoder: RecordingDecoder, folder: Path) -> None:
    engine, plain = Engine(model.pipeline, read=decoder.reader), Engine(model.pipeline)
    paths = [folder / "0.jpg", folder / "1.jpg"]
    for ours, theirs in zip(engine(paths), plain(paths), strict=True):
        assert_same(ours, theirs)
    np.testing.assert_array_equal(engine.propose(paths[0])[0].boxes, plain.propose(paths[0])[0].boxes)
    assert len(decoder.given) == 3
    assert_same(engine(make_picture(60, 80))[0], plain(make_picture(60, 80))[0])
    with pytest.raises(ImageError, match=r"4b\.jpg"):
        engine([folder / "0.jpg", folder / "4b.jpg"])


def test_a_broken_device_ends_the_stream(model: FpnDetector, decoder: RecordingDecoder, folder: Path) -> None:
    engine = Engine(model.pipeline, read=decoder.reader)
    paths = [folder / "0.jpg"] * 5
    stream = engine.stream(paths)
    next(stream)
    decoder.failure = BackendError("cuda:0 stopped working")
    with pytest.raises(BackendError):
        list(stream)


def test_pictures_of_pixels_that_are_tensors(
    tiny: Tiny, folder: Path, decoder: RecordingDecoder, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("infer", folder, "--plan", tiny.plan, "--save", "plain").code == 3
    monkeypatch.setattr("fpn_engine.engine.to_array", decoder.reader)
    assert run("infer", folder, "--plan", tiny.plan, "--save", "ours", "--max-pixels", 5000).code == 3
    assert len(decoder.given) == len(SHAPES) - 1  # one is larger
    for number in range(4):
        ours, plain = (np.asarray(Image.open(Path(name) / f"{number}.jpg")) for name in ("ours", "plain"))
        np.testing.assert_array_equal(ours, plain)


# Where it cannot be


def on_cuda(tiny: Tiny) -> Plan:
    plan = read_plan(tiny.plan)
    return dataclasses.replace(plan, manifest=dataclasses.replace(plan.manifest, device="cuda"))


@pytest.mark.parametrize(
    ("decode", "message"),
    [
        (
            "gpu",
            r"--decode gpu \(decode='gpu'\) is for plans that run on a GPU, .* for onnxruntime on cpu;",
        ),
        ("nvjpeg", "decode must be cpu or gpu, not 'nvjpeg'"),
    ],
)
@pytest.mark.parametrize("images", [None, 1])
def test_a_plan_for_the_cpu(decode: str, message: str, images: int | None, tiny: Tiny) -> None:
    with pytest.raises(OptionError, match=message):
        Engine.load(tiny.plan, decode=decode, images=images)  # type: ignore[arg-type]


def test_no_cuda_device(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(FpnEngineError, match="PyTorch finds no CUDA device here"):
        Engine.from_plan(on_cuda(tiny), decode="gpu")


def test_no_torchcodec(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr("fpn_engine.devices.choose_device", lambda *arguments: torch.device("cuda", 0))
    monkeypatch.setattr(device_reader, "version", absent)
    with pytest.raises(BackendError, match=r"needs TorchCodec 0\.17 or later, which is not installed; pip install"):
        Engine.from_plan(on_cuda(tiny), decode="gpu")


@pytest.mark.parametrize("command", ["infer", "eval"])
def test_the_commands_say_so(command: str, tiny: Tiny, folder: Path, workplace: Path, run: Run) -> None:
    arguments: list[object] = [folder / "0.jpg"]
    if command == "eval":
        truth = workplace / "truth.json"
        annotate(truth, {"0.jpg": (make_picture(60, 80), [(1, [1, 2, 30, 40])])})
        arguments = ["--annotations", truth, "--images", folder]
    ran = run(command, *arguments, "--plan", tiny.plan, "--decode", "gpu")
    assert ran.code == 1
    assert ran.err.count("\n") == 1
    assert "--decode gpu (decode='gpu') is for plans that run on a GPU" in ran.err
    assert run(command, *arguments, "--plan", tiny.plan, "--decode", "nvjpeg").code == 2


def test_nothing_is_imported_before_it_is_asked_for() -> None:
    code = (
        "import sys, fpn_engine.engine, fpn_engine.runtime, fpn_engine.cli.app, fpn_engine.runtime.device_reader\n"
        "print(*({'torchcodec', 'torchvision'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, [])

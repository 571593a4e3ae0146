"""Decoding on a real GPU: near to Pillow, upright, beside captures, and no wait once the pixels are there."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fpn_engine.engine import Engine
from fpn_engine.errors import ImageError
from fpn_engine.images import read_image
from fpn_engine.runtime.cuda import make_cuda_runner
from fpn_engine.runtime.device_reader import DeviceReader, make_cuda_reader
from fpn_engine.runtime.runner import Group
from fpn_engine.runtime.staging import SLOTS
from fpn_export.detector import FpnDetector
from tests.engine.image_files import ORIENTATION_TAG
from tests.engine.runtime.conftest import make_group
from tests.engine.runtime.jpeg_stand_ins import outcome, write
from tests.engine.runtime.test_gpu import assert_twins, exchange_tf32, no_waiting
from tests.engine.test_jpeg import OTHER, PLAIN

pytestmark = pytest.mark.gpu
NEAR, SHARE = 3, 0.99  # grey levels of so many values: what TorchCodec's own tests hold nvJPEG to
LUMA = np.array([0.299, 0.587, 0.114])  # of which chroma, however it is upsampled, changes nothing


@pytest.fixture(scope="module")
def reader() -> DeviceReader:
    pytest.importorskip("torchcodec", reason="TorchCodec is not installed")
    return make_cuda_reader(torch.device("cuda", torch.cuda.current_device()))


@pytest.fixture(scope="module")
def cuda_model(model: FpnDetector) -> Iterator[FpnDetector]:
    allowed = exchange_tf32(False)
    yield copy.deepcopy(model).cuda()
    exchange_tf32(allowed)


def soft_picture(height: int, width: int, seed: int) -> Image.Image:
    """Coloured patches without hard edges, on which decoders agree as they do on photographs."""
    patches = np.random.default_rng(seed).integers(0, 256, (-(-height // 16), -(-width // 16), 3), dtype=np.uint8)
    return Image.fromarray(patches).resize((width, height), Image.Resampling.BICUBIC)


def assert_near(ours: torch.Tensor, theirs: np.ndarray, weights: np.ndarray | None = None) -> None:
    assert ours.is_cuda
    assert tuple(ours.shape) == theirs.shape
    differences = ours.cpu().numpy().astype(float) - theirs
    if weights is not None:
        differences = differences @ weights
    assert (np.abs(differences) <= NEAR).mean() >= SHARE, np.abs(differences).max()


@pytest.mark.parametrize("form", ["4:4:4", "4:2:0", "4:2:2", "grey", "progressive", "restarts"])
@pytest.mark.parametrize("shape", [(480, 640), (61, 79), (1, 1), (8, 300)])
def test_near_to_pillow(form: str, shape: tuple[int, int], reader: DeviceReader, tmp_path: Path) -> None:
    picture = soft_picture(*shape, seed=1)
    options: dict[str, dict[str, object]] = {
        "4:4:4": {"subsampling": 0},
        "4:2:2": {"subsampling": 1},
        "progressive": {"progressive": True},
        "restarts": {"restart_marker_blocks": 4},
    }
    file = io.BytesIO()
    (picture.convert("L") if form == "grey" else picture).save(file, "JPEG", quality=90, **options.get(form, {}))
    path = write(tmp_path / "a.jpg", file.getvalue())
    pixels = reader(path)
    if isinstance(pixels, np.ndarray):
        assert min(shape) < 16, "an ordinary file was left to Pillow"
        return
    assert_near(pixels, read_image(path), None if form in ("4:4:4", "grey") else LUMA)


@pytest.mark.parametrize("turn", range(1, 9))
def test_upright(turn: int, reader: DeviceReader, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = turn
    soft_picture(96, 160, seed=turn).save(tmp_path / "a.jpg", subsampling=0, exif=exif)
    pixels = reader(tmp_path / "a.jpg")
    assert isinstance(pixels, torch.Tensor)
    assert_near(pixels, read_image(tmp_path / "a.jpg"))


@pytest.mark.parametrize("name", [*PLAIN, *OTHER])
def test_no_file_ends_otherwise_than_with_pillow(name: str, reader: DeviceReader, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jpg", (PLAIN | OTHER)[name])
    refused = outcome(lambda each: torch.as_tensor(reader(each)).cpu(), path)[1]
    assert refused == outcome(read_image, path)[1]


def test_damage_breaks_neither_the_process_nor_the_device(reader: DeviceReader, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    read = 0
    for name in ("4:2:0", "progressive"):
        whole = np.frombuffer(PLAIN[name], np.uint8)
        for _ in range(100):
            damaged = whole.copy()
            damaged[rng.integers(0, whole.size, 3)] = rng.integers(0, 256, 3)
            try:
                read += reader(write(tmp_path / "a.jpg", damaged.tobytes())).shape[2] == 3
            except ImageError:
                continue
    assert read > 0
    assert isinstance(reader(write(tmp_path / "a.jpg", PLAIN["4:2:0"])), torch.Tensor)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for number, shape in enumerate([(60, 80), (61, 79), (90, 50), (60, 80), (200, 40), (480, 640)]):
        soft_picture(*shape, seed=number).save(folder / f"{number}.jpg", quality=95, subsampling=0)
    soft_picture(60, 80, seed=9).save(folder / "3b.png")
    return folder


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_streams_find_the_same_pixels_objects(
    batch_size: int, graphs: bool, cuda_model: FpnDetector, reader: DeviceReader, folder: Path
) -> None:
    """Against the same engine on the same decoded pixels by way of the host: only the way differs."""
    engine = Engine(cuda_model.pipeline, batch_size=batch_size, graphs=graphs, read=reader)
    plain = Engine(cuda_model.pipeline, graphs=False)
    paths = sorted(folder.iterdir()) * 6
    for path, found in zip(paths, engine.stream(paths), strict=True):
        pixels = reader(path)
        on_host = pixels.cpu().numpy() if isinstance(pixels, torch.Tensor) else pixels
        assert isinstance(found.pixels, torch.Tensor) == (path.suffix == ".jpg")
        assert_twins([found.result], plain(np.ascontiguousarray(on_host)))  # type: ignore[list-item]


def test_nothing_waits_once_the_pixels_are_there(cuda_model: FpnDetector, reader: DeviceReader, folder: Path) -> None:
    runner = make_cuda_runner(cuda_model.pipeline, batch_size=2)
    group, task = make_group([(60, 80), (61, 79)])
    group = Group([reader(folder / "0.jpg"), reader(folder / "1.jpg")], group.image_sizes)
    runner.warm(group, task)
    with no_waiting():
        pending = [runner.submit(group, task) for _ in range(SLOTS)]
    counts = [each.wait().counts.tolist() for each in pending]
    assert counts[0] == counts[1] == counts[2]


def test_memory_of_pixels_is_given_back_only_after_use(
    cuda_model: FpnDetector, reader: DeviceReader, folder: Path
) -> None:
    """Each image is dropped as soon as it is submitted, and others are decoded into what memory is free."""
    runner = make_cuda_runner(cuda_model.pipeline, batch_size=1)
    group, task = make_group([(480, 640)])
    wanted = runner.submit(Group([reader(folder / "5.jpg")], group.image_sizes), task).wait()
    for _ in range(20):
        pending = [runner.submit(Group([reader(folder / "5.jpg")], group.image_sizes), task) for _ in range(SLOTS)]
        for _ in range(4):
            reader(folder / "4.jpg")
        for each in pending:
            found = each.wait()
            torch.testing.assert_close(found.scores, wanted.scores, atol=1e-4, rtol=0)


def test_memory_is_flat(cuda_model: FpnDetector, reader: DeviceReader, folder: Path) -> None:
    engine = Engine(cuda_model.pipeline, batch_size=2, read=reader)
    paths = sorted(folder.iterdir()) * 4
    for _ in range(2):
        list(engine.stream(paths))
    before = torch.cuda.mem_get_info()[0]
    for _ in range(10):
        list(engine.stream(paths))
    assert torch.cuda.mem_get_info()[0] >= before - (64 << 20)

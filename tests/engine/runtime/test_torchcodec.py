"""TorchCodec: absent, old, broken, decoding nothing; its streams; and its decoder in its form for the CPU."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fpn_engine.errors import BackendError, DeviceMemoryError, ImageError
from fpn_engine.images import read_image
from fpn_engine.runtime import device_reader
from fpn_engine.runtime.cuda import DECODING
from fpn_engine.runtime.device_reader import DeviceReader, load_torchcodec, make_cuda_reader, probe
from tests.engine.image_files import photograph, save
from tests.engine.runtime.jpeg_stand_ins import RecordingDecoder, outcome, write
from tests.engine.test_jpeg import OTHER, PLAIN

DEVICE = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("found", "words"),
    [(None, "which is not installed"), ("0.10.0+cu130", "and 0.10.0+cu130 is installed"), ("0.16.1", "0.16.1")],
)
def test_without_torchcodec(found: str | None, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if found is None:
            raise PackageNotFoundError(package)
        return found

    monkeypatch.setattr(device_reader, "version", version)
    with pytest.raises(BackendError) as caught:
        load_torchcodec()
    message = str(caught.value)
    assert words in message
    assert "needs TorchCodec 0.17 or later" in message
    assert "pip install 'torchcodec>=0.17'" in message
    assert "--decode gpu" in message


@pytest.mark.parametrize(
    "failure",
    [OSError("undefined symbol\nand more"), ImportError("undefined symbol"), RuntimeError("undefined symbol")],
)
def test_a_torchcodec_that_does_not_load(failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise failure

    monkeypatch.setattr(device_reader, "version", lambda package: "0.17.0")
    monkeypatch.setattr(device_reader.importlib, "import_module", fail)
    with pytest.raises(BackendError, match=r"0\.17\.0 cannot be imported \(undefined symbol\); pip install"):
        load_torchcodec()


REFUSAL = "decode_jpegs_cuda, /a/b/DecodeJpegCuda.cpp:30, torchcodec was not compiled with nvJPEG support"


def test_a_decoder_that_decodes_nothing_is_refused_at_once() -> None:
    def refuse(data: bytes) -> torch.Tensor:
        raise RuntimeError(REFUSAL)

    with pytest.raises(BackendError, match=r"on cuda:0 \(torchcodec was not compiled with nvJPEG support\); install"):
        probe(refuse, DEVICE)
    for wrong in (torch.zeros(3, 32, 32, dtype=torch.uint8), torch.zeros(1, 32, 32, dtype=torch.uint8)):
        with pytest.raises(BackendError, match="came out wrong"):
            probe(lambda data, wrong=wrong: wrong, DEVICE)
    decoder = RecordingDecoder()
    with decoder.apart():
        probe(decoder, DEVICE)


class FakeStream:
    """A stream that notes its creation and when it is waited for."""

    made: list[FakeStream]

    def __init__(self, priority: int = 0) -> None:
        self.priority, self.waits = priority, 0
        FakeStream.made.append(self)

    def synchronize(self) -> None:
        self.waits += 1


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Streams of no device; returns those that were current, None for the end of each."""
    current: list[Any] = []

    @contextlib.contextmanager
    def use(stream: FakeStream) -> Iterator[None]:
        current.append(stream)
        yield
        current.append(None)

    FakeStream.made = []
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", use)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return current


def test_each_thread_decodes_on_a_stream_of_its_own(
    fake_cuda: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """High priority ones, of which no runner's is one, so that a capture never meets them."""
    calls: list[dict[str, Any]] = []

    def decode_jpeg(data: torch.Tensor, **options: Any) -> torch.Tensor:
        assert fake_cuda[-1] is not None
        assert DECODING._inside == 1
        assert (data.dtype, data.ndim) == (torch.uint8, 1)
        calls.append(options)
        with Image.open(io.BytesIO(data.numpy().tobytes())) as image:
            return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())

    monkeypatch.setattr(device_reader, "load_torchcodec", lambda: decode_jpeg)
    reader = make_cuda_reader(DEVICE)
    path = save(tmp_path / "a.jpg", photograph())
    for _ in range(2):
        assert isinstance(reader(path), torch.Tensor)
    thread = threading.Thread(target=reader, args=(path,))
    thread.start()
    thread.join()
    assert [stream.priority for stream in FakeStream.made] == [-1, -1]
    assert [stream.waits for stream in FakeStream.made] == [3, 1]  # the probe is one
    assert calls == [{"mode": "RGB", "device": DEVICE}] * 4


@pytest.mark.parametrize(
    ("message", "kind"), [("CUDA error: an illegal memory access", BackendError), ("out of memory", DeviceMemoryError)]
)
def test_a_dead_device_shows_when_the_stream_is_waited_for(
    message: str,
    kind: type[Exception],
    fake_cuda: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def decode_jpeg(data: bytes, **options: Any) -> torch.Tensor:
        return torch.tensor((200, 100, 50), dtype=torch.uint8)[:, None, None].expand(3, 32, 32)

    def fail(stream: FakeStream) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(device_reader, "load_torchcodec", lambda: decode_jpeg)
    reader = make_cuda_reader(DEVICE)
    monkeypatch.setattr(FakeStream, "synchronize", fail)
    with pytest.raises(kind, match="cuda:0"):
        reader(save(tmp_path / "a.jpg", photograph()))


# TorchCodec's own decoder in its form for the CPU: the same call, and errors of the same kind


@pytest.fixture
def torchcodec_reader() -> DeviceReader:
    decoders = pytest.importorskip("torchcodec.decoders", reason="TorchCodec is not installed")
    return DeviceReader(lambda data: decoders.decode_jpeg(data, mode="RGB", device="cpu"))


@pytest.mark.parametrize("name", [*PLAIN, *OTHER])
def test_torchcodec_decodes_as_pillow_does(name: str, torchcodec_reader: DeviceReader, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jpg", (PLAIN | OTHER)[name])
    found, refused = outcome(torchcodec_reader, path)
    expected, wanted = outcome(read_image, path)
    assert refused == wanted
    if expected is not None:
        assert found.shape == expected.shape
        assert int(np.abs(found.astype(int) - expected).max()) <= 2
    assert isinstance(torchcodec_reader(path), torch.Tensor) if name in PLAIN else True


def test_nor_does_damage_raise_anything_else(torchcodec_reader: DeviceReader, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    whole = np.frombuffer(PLAIN["progressive"], np.uint8)
    rng = np.random.default_rng(0)
    shapes = []
    for _ in range(100):
        damaged = whole.copy()
        damaged[rng.integers(0, whole.size, 3)] = rng.integers(0, 256, 3)
        path.write_bytes(damaged.tobytes())
        with contextlib.suppress(ImageError):
            shapes.append(torchcodec_reader(path).shape)
    assert 0 < len(shapes) < 100
    assert {len(shape) for shape in shapes} == {3}

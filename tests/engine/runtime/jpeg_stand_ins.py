"""What stands in for TorchCodec on a GPU: Pillow, which notes what it is given; and what comes of reading."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fpn_engine.errors import ImageError
from fpn_engine.runtime.device_reader import DeviceReader


class RecordingDecoder:
    """Decodes on the CPU to planes, as the real one does; ``given``: the files. ``failure`` is raised once."""

    def __init__(self) -> None:
        self.given: list[bytes] = []
        self.failure: Exception | None = None
        self.inside = self.left = 0

    def __call__(self, data: bytes) -> Tensor:
        assert self.inside == 1
        self.given.append(data)
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        with Image.open(io.BytesIO(data)) as image:
            return torch.from_numpy(np.asarray(image.convert("RGB")).transpose(2, 0, 1).copy())

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        self.inside += 1
        yield
        self.inside -= 1
        self.left += 1

    @property
    def reader(self) -> DeviceReader:
        return DeviceReader(self, self.apart)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def outcome(read: Callable[[Path], Any], path: Path) -> tuple[Any, str]:
    """The pixels, or what was refused."""
    try:
        return np.asarray(read(path)), ""
    except ImageError as error:
        return None, str(error)

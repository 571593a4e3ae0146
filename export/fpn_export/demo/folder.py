"""The folder of a demonstration: its own files may be replaced, no others."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fpn_engine.errors import FpnEngineError
from fpn_engine.files import replacing

MARK = "fpn-engine demo"  # near the beginning of each of its files
MARKED_BYTES = 1024


class DemoFolder:
    """A scene, its picture with boxes and a page in one folder.

    Args: path: need not exist. Files there that an earlier demonstration wrote are replaced.
    Raises: FpnEngineError, from the constructor, if another file has one of the names.
    """

    def __init__(self, path: Path) -> None:
        self.scene, self.picture, self.page = path / "scene.png", path / "detections.png", path / "index.html"
        for file in (self.scene, self.picture, self.page):
            if os.path.lexists(file) and not _is_ours(file):
                raise FpnEngineError(f"{file} is not from an earlier demo; name another folder with --output")

    def save_scene(self, image: Image.Image) -> None:
        _save_png(image, self.scene)

    def save_picture(self, image: Image.Image) -> None:
        _save_png(image, self.picture)

    def save_page(self, text: str) -> None:
        """Write the page, which must have ``MARK`` within its first bytes."""
        with replacing(self.page) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _is_ours(path: Path) -> bool:
    if not os.path.isfile(path):
        return False
    try:
        with path.open("rb") as file:
            return MARK.encode() in file.read(MARKED_BYTES)
    except OSError:
        return False


def _save_png(image: Image.Image, path: Path) -> None:
    about = PngInfo()
    about.add_text("Software", MARK)
    with replacing(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=about)

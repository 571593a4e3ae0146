"""Checkpoints that torchvision publishes and whose batch norms it runs with eps = 0.

torchvision sets that eps in code when it loads these files, so it is not in the tensors; the file is known
by the first eight hex digits of its SHA-256, which torchvision puts into its name.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from fpn_engine.errors import CheckpointError
from fpn_engine.named import MODELS
from fpn_engine.spec import Category
from fpn_export.coco_categories import COCO_CATEGORIES


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One published file: everything but what is said here is ModelSpec's default."""

    name: str
    digest: str
    categories: tuple[Category, ...]

    def spec_values(self) -> dict[str, Any]:
        """What ModelSpec's defaults do not say, as JSON values."""
        return {"categories": [dataclasses.asdict(c) for c in self.categories], "batch_norm_eps": 0.0}


CATEGORIES = {
    "coco": COCO_CATEGORIES,
    "coco-mask": COCO_CATEGORIES,
    "coco-person": COCO_CATEGORIES[:1],
}
PUBLISHED = tuple(
    Published(name=model.file_name, digest=model.digest, categories=CATEGORIES[model.name])
    for model in MODELS
    if model.file_name
)


def find_published(name: str, sha256: str) -> Published | None:
    """The published file with this digest, under whatever name; None if it is not one.

    Raises: CheckpointError for a file that has a published name and other contents.
    """
    for published in PUBLISHED:
        if sha256.startswith(published.digest):
            return published
        if name == published.name:
            raise CheckpointError(
                f"{name} is not the file that torchvision publishes under this name: its sha256 starts with "
                f"{sha256[:8]} instead of {published.digest}; download it again"
            )
    return None

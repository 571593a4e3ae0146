"""Named models: those that come with the package, and those that torchvision publishes and this engine runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fpn_engine.errors import FpnEngineError
from fpn_engine.files import cache_folder

BUNDLED = "demo"
MIRROR = "FPN_ENGINE_MIRROR"
PUBLISHED_AT = "https://download.pytorch.org/models"


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedModel:
    """A model that ``--model`` accepts.

    Attributes:
        name, builder: what it is called here, and the function that makes it in torchvision, which is understood too.
        about: what it detects, for people.
        file_name: as published; its last part are the first eight hex digits of the file's SHA-256. Empty for those
            that come along.
        megabytes: size of the file.
    """

    name: str
    about: str
    builder: str = ""
    file_name: str = ""
    megabytes: int = 0

    @property
    def digest(self) -> str:
        """The first eight hex digits of the published file's SHA-256."""
        return self.file_name.removesuffix(".pth").rpartition("-")[2]


MODELS = (
    NamedModel(name=BUNDLED, about="shapes in generated scenes; comes with fpn-engine"),
    NamedModel(name="scene-masks", about="mask proposals for generated scenes; comes with fpn-engine"),
    NamedModel(
        name="coco",
        about="COCO's 80 classes, torchvision's Faster R-CNN R50-FPN",
        builder="fasterrcnn_resnet50_fpn",
        file_name="fasterrcnn_resnet50_fpn_coco-258fb6c6.pth",
        megabytes=168,
    ),
    NamedModel(
        name="coco-mask",
        about="COCO's 80 classes, the boxes of torchvision's Mask R-CNN R50-FPN",
        builder="maskrcnn_resnet50_fpn",
        file_name="maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth",
        megabytes=178,
    ),
    NamedModel(
        name="coco-person",
        about="people, the boxes of torchvision's Keypoint R-CNN R50-FPN",
        builder="keypointrcnn_resnet50_fpn",
        file_name="keypointrcnn_resnet50_fpn_coco-fc266e95.pth",
        megabytes=237,
    ),
)

# Parts of the names of other well-known models, and why they are not among the above.
UNSUPPORTED = (
    ("retinanet", "it has one stage, not two"),
    ("fcos", "it has one stage, not two"),
    ("ssd", "it has one stage, not two"),
    ("yolo", "it has one stage, not two"),
    ("detr", "it is a transformer"),
    ("mobilenet", "its body is a MobileNet, not a ResNet"),
    ("v2", "its box head has four convolutions"),
)


def find_model(name: str) -> NamedModel:
    """The model called ``name``, here or in torchvision.

    Raises: FpnEngineError for another name, which says what there is and, of well-known models, why not this one.
    """
    for model in MODELS:
        if name in (model.name, model.builder) and name:
            return model
    known = ", ".join(model.name for model in MODELS)
    for part, reason in UNSUPPORTED:
        if part in name.lower():
            raise FpnEngineError(f"the model {name} is not supported: {reason}; there are {known}")
    raise FpnEngineError(f"there is no model named {name!r}; there are {known}, and fpn-engine export takes your own")


def download_url(model: NamedModel) -> str:
    """Where the file of ``model`` is: on torchvision's server, or below $FPN_ENGINE_MIRROR.

    Raises: FpnEngineError if that is not an address of the web.
    """
    base = os.environ.get(MIRROR) or PUBLISHED_AT
    if not base.lower().startswith(("http://", "https://")):
        raise FpnEngineError(f"{MIRROR} is {base!r}; set it to an address that starts with http:// or https://")
    return f"{base.rstrip('/')}/{model.file_name}"


def checkpoint_places(model: NamedModel) -> Iterator[Path]:
    """Where the file of ``model`` may lie, that for downloads first.

    With $TORCH_HOME all is kept there, as torchvision does; else torchvision's own folder is only looked into.

    Raises: FpnEngineError if there is no usable cache folder.
    """
    home = os.environ.get("TORCH_HOME")
    if not home:
        yield cache_folder() / "checkpoints" / model.file_name
        home = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "torch")
    yield Path(os.path.expanduser(home)) / "hub" / "checkpoints" / model.file_name

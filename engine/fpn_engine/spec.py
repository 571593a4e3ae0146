"""ModelSpec: everything about a detector that its tensors do not say (Lin et al. 2017, secs. 3-5)."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from fpn_engine.errors import SpecError

MODELS = ("faster_rcnn", "fast_rcnn")
ARCHITECTURES = ("resnet18", "resnet34", "resnet50", "resnet101")
CHANNEL_ORDERS = ("rgb", "bgr")


@dataclass(frozen=True, slots=True, kw_only=True)
class Category:
    """One class of a data set. Ids may have gaps (COCO's run to 90 for 80 classes)."""

    id: int
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RoIPoolSpec:
    """How features are pooled for a region (sec. 4.2): ``sampling_ratio`` 0 means adaptive."""

    output_size: int = 7
    sampling_ratio: int = 2
    aligned: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """The whole contract of a model. Defaults are torchvision's ``fasterrcnn_resnet50_fpn``.

    The names are torchvision's arguments. It is stored as JSON in the ONNX file and in the plan.
    Sizes are pixels; boxes are (x1, y1, x2, y2), half-open. Categories are in label order: label 1 is the
    first, label 0 is background.

    Raises: SpecError (a ValueError) for a value outside its range, and from ``from_dict`` for unknown keys.
    """

    categories: tuple[Category, ...]
    model: str = "faster_rcnn"
    arch: str = "resnet50"
    fpn_channels: int = 256

    min_size: int = 800
    max_size: int = 1333
    size_divisor: int = 32
    image_mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    image_std: tuple[float, ...] = (0.229, 0.224, 0.225)
    channel_order: str = "rgb"

    levels: tuple[int, ...] = (2, 3, 4, 5, 6)
    roi_levels: tuple[int, ...] = (2, 3, 4, 5)
    anchor_sizes: tuple[tuple[float, ...], ...] = ((32.0,), (64.0,), (128.0,), (256.0,), (512.0,))
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)

    rpn_pre_nms_top_n_test: int = 1000
    rpn_post_nms_top_n_test: int = 1000
    rpn_nms_thresh: float = 0.7
    rpn_score_thresh: float = 0.0
    rpn_min_size: float = 1e-3

    box_roi_pool: RoIPoolSpec = field(default_factory=RoIPoolSpec)
    canonical_level: int = 4
    canonical_size: int = 224
    bbox_reg_weights: tuple[float, ...] = (10.0, 10.0, 5.0, 5.0)
    box_score_thresh: float = 0.05
    box_nms_thresh: float = 0.5
    box_detections_per_img: int = 100
    box_min_size: float = 1e-2

    batch_norm_eps: float = 1e-5
    source: str = ""

    def __post_init__(self) -> None:
        _require_one_of("model", self.model, MODELS)
        _require_one_of("arch", self.arch, ARCHITECTURES)
        _require_one_of("channel_order", self.channel_order, CHANNEL_ORDERS)
        _require(len(self.categories) >= 1, "categories", "at least one category", self.categories)
        ids = [category.id for category in self.categories]
        _require(len(set(ids)) == len(ids), "categories", "distinct ids", ids)
        for name in ("fpn_channels", "min_size", "max_size", "rpn_pre_nms_top_n_test", "canonical_size"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("rpn_post_nms_top_n_test", "box_detections_per_img"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("rpn_nms_thresh", "rpn_score_thresh", "box_nms_thresh", "box_score_thresh"):
            value = getattr(self, name)
            _require(0.0 <= value <= 1.0, name, "a number from 0 to 1", value)
        _require(self.min_size <= self.max_size, "min_size", f"at most max_size ({self.max_size})", self.min_size)
        _require(self.size_divisor == 32, "size_divisor", "32, the stride of C5", self.size_divisor)
        _require(len(self.image_mean) == 3, "image_mean", "three numbers", self.image_mean)
        _require(
            len(self.image_std) == 3 and min(self.image_std) > 0,
            "image_std",
            "three positive numbers",
            self.image_std,
        )
        for name in ("levels", "roi_levels", "anchor_sizes", "aspect_ratios"):
            _require(len(getattr(self, name)) >= 1, name, "a list with at least one entry", getattr(self, name))
        _require(self.levels == _consecutive(self.levels), "levels", "consecutive, finest first", self.levels)
        _require(
            set(self.roi_levels) <= set(self.levels) and self.roi_levels == _consecutive(self.roi_levels),
            "roi_levels",
            f"consecutive and among {self.levels}",
            self.roi_levels,
        )
        _require(
            len(self.anchor_sizes) == len(self.levels),
            "anchor_sizes",
            f"one tuple for each of the {len(self.levels)} levels",
            self.anchor_sizes,
        )
        _require(
            len({len(sizes) for sizes in self.anchor_sizes}) == 1,
            "anchor_sizes",
            "the same number of sizes on every level (the RPN head is shared)",
            self.anchor_sizes,
        )
        _require(len(self.bbox_reg_weights) == 4, "bbox_reg_weights", "four numbers", self.bbox_reg_weights)
        sizes = [side for level in self.anchor_sizes for side in level]
        _require(bool(sizes) and min(sizes) > 0, "anchor_sizes", "positive pixels", self.anchor_sizes)
        _require(min(self.aspect_ratios) > 0, "aspect_ratios", "positive", self.aspect_ratios)
        pool = self.box_roi_pool
        _require(pool.output_size >= 1, "box_roi_pool.output_size", "at least 1", pool.output_size)
        _require(
            pool.sampling_ratio >= 0,
            "box_roi_pool.sampling_ratio",
            "0 (adaptive) or more",
            pool.sampling_ratio,
        )

    @property
    def num_classes(self) -> int:
        """Outputs of the classifier: the categories and background."""
        return len(self.categories) + 1

    @property
    def num_anchors(self) -> int:
        """Anchors per location, the same on every level."""
        return len(self.anchor_sizes[0]) * len(self.aspect_ratios)

    @property
    def strides(self) -> tuple[int, ...]:
        """Nominal stride of each level in pixels, finest first: 4, 8, 16, 32, 64."""
        return tuple(2**level for level in self.levels)

    def to_dict(self) -> dict[str, Any]:
        """The spec as JSON-ready values; :meth:`from_dict` gives it back unchanged."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Self:
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise SpecError(f"the model specification is not valid JSON: {error}") from None
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build a spec from JSON values. Raises SpecError for unknown keys and wrong types."""
        if not isinstance(values, Mapping):
            raise SpecError(f"a model specification is a JSON object, not {type(values).__name__}")
        known = {f.name: f for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise SpecError(f"unknown key {unknown[0]!r} in the model specification; known keys: {', '.join(known)}")
        try:
            return cls(**{name: _convert(known[name], value) for name, value in values.items()})
        except SpecError:
            raise
        except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            raise SpecError(f"the model specification has a value of the wrong form: {error}") from None


def numbered_categories(count: int) -> tuple[Category, ...]:
    """Categories 1..count named class_1.. for a checkpoint that brings no names."""
    return tuple(Category(id=i, name=f"class_{i}") for i in range(1, count + 1))


def _require(ok: bool, name: str, allowed: str, given: object) -> None:
    if not ok:
        raise SpecError(f"{name} must be {allowed}, not {given!r}")


def _consecutive(levels: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(range(levels[0], levels[0] + len(levels)))


def _require_one_of(name: str, given: str, allowed: Sequence[str]) -> None:
    _require(given in allowed, name, "one of " + ", ".join(allowed), given)


def _known_keys(cls: type, values: Mapping[str, Any]) -> Mapping[str, Any]:
    unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
    if unknown:
        raise SpecError(f"unknown key {unknown[0]!r} in the model specification's {cls.__name__}")
    return values


def _categories(values: Sequence[Any]) -> tuple[Category, ...]:
    return tuple(
        Category(id=int(v["id"]), name=str(v["name"]))
        if isinstance(v, Mapping)
        else Category(id=int(v[0]), name=str(v[1]))
        for v in values
    )


def _floats(values: Sequence[Any]) -> tuple[float, ...]:
    return tuple(_finite(v) for v in values)


def _ints(values: Sequence[Any]) -> tuple[int, ...]:
    return tuple(int(v) for v in values)


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{value!r} is not a finite number")
    return number


def _convert(known: dataclasses.Field[Any], value: Any) -> Any:
    convert = _CONVERT.get(known.name) or _CONVERT_SCALAR[str(known.type)]
    return convert(value)


def _integer(value: Any) -> int:
    if isinstance(value, bool) or int(value) != value:
        raise ValueError(f"{value!r} is not a whole number")
    return int(value)


_CONVERT: dict[str, Any] = {
    "categories": _categories,
    "image_mean": _floats,
    "image_std": _floats,
    "levels": _ints,
    "roi_levels": _ints,
    "anchor_sizes": lambda values: tuple(_floats(sizes) for sizes in values),
    "aspect_ratios": _floats,
    "bbox_reg_weights": _floats,
    "box_roi_pool": lambda values: RoIPoolSpec(**_known_keys(RoIPoolSpec, values)),
}
_CONVERT_SCALAR: dict[str, Any] = {"int": _integer, "float": _finite, "str": str}

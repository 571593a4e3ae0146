"""ModelSpec: everything about a detector that its tensors do not say (Lin et al. 2017, secs. 3-5)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Self

from fpn_engine.errors import SpecError
from fpn_engine.spec_json import JsonSpec, convert_value, finite_number, truth_value, whole_number

MODELS = ("faster_rcnn", "fast_rcnn", "rpn")
ARCHITECTURES = ("resnet18", "resnet34", "resnet50", "resnet101")
BOTTLENECKS = ("resnet50", "resnet101")  # each stage puts out four times the width of its 3x3 convolutions
PYRAMIDS = ("fpn", "bottom_up", "top_down", "none")
BOX_HEADS = ("two_mlp", "conv5")
POOLINGS = ("align", "max")
FINEST_STAGE, COARSEST_STAGE = 2, 5  # c2 and c5; p6 and p7 have no stage of their own
CHANNEL_ORDERS = ("rgb", "bgr")
LEVELS = (2, 3, 4, 5, 6, 7)
MAX_DETECTIONS = 100_000  # of an image: a thousand proposals of a hundred classes
_POSITIVE = (
    "body_width",
    "fpn_channels",
    "min_size",
    "max_size",
    "rpn_pre_nms_top_n_test",
    "rpn_post_nms_top_n_test",
    "canonical_size",
    "box_detections_per_img",
)
_FRACTIONS = ("rpn_nms_thresh", "rpn_score_thresh", "box_nms_thresh", "box_score_thresh")


@dataclass(frozen=True, slots=True, kw_only=True)
class Category:
    """One class of a data set. Ids may have gaps (COCO's run to 90 for 80 classes)."""

    id: int
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RoIPoolSpec:
    """How features are pooled for a region (sec. 4.2).

    ``kind`` is "align" (RoIAlign) or "max" (RoIPool, Girshick 2015, sec. 2.1), to which ``sampling_ratio`` and
    ``aligned`` do not apply. ``sampling_ratio`` 0 means adaptive.
    """

    kind: str = "align"
    output_size: int = 7
    sampling_ratio: int = 2
    aligned: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec(JsonSpec):
    """The whole contract of a model. Defaults are torchvision's ``fasterrcnn_resnet50_fpn``.

    ``model`` says which parts there are: RPN and box head, the box head alone on given proposals ("fast_rcnn"), or
    the RPN alone, whose proposals are detections of its one category. ``pyramid`` is that of tables 1-3: "fpn";
    "bottom_up", without top-down additions (d); "top_down", without lateral connections (e); or "none", one stage of
    the ResNet as it is (a, b). ``box_head`` "conv5" is the ResNet's stage 5 on RoIs of C4 (tables 2 and 3, a).

    The names are torchvision's arguments. It is stored as JSON in the ONNX file and in the plan.
    Sizes are pixels; boxes are (x1, y1, x2, y2), half-open. Categories are in label order: label 1 is the
    first, label 0 is background. ``body_width`` is the width of the ResNet's stem and first stage, 64 in He et al.;
    the others are 2, 4 and 8 times as wide.

    Raises: SpecError (a ValueError) for a value outside its range, and from ``from_dict`` for unknown keys.
    """

    categories: tuple[Category, ...]
    model: str = "faster_rcnn"
    arch: str = "resnet50"
    body_width: int = 64
    pyramid: str = "fpn"
    fpn_channels: int = 256
    rpn_head_shared: bool = True
    box_head: str = "two_mlp"

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
        _require_one_of("pyramid", self.pyramid, PYRAMIDS)
        _require_one_of("box_head", self.box_head, BOX_HEADS)
        _require_one_of("box_roi_pool.kind", self.box_roi_pool.kind, POOLINGS)
        _require_one_of("channel_order", self.channel_order, CHANNEL_ORDERS)
        ids = [category.id for category in self.categories]
        pool = self.box_roi_pool
        sides = [side for sizes in self.anchor_sizes for side in sizes]
        for name, ok, allowed in (
            ("categories", len(ids) >= 1, "at least one category"),
            ("categories", len(set(ids)) == len(ids), "categories of distinct ids"),
            ("categories", max(map(abs, ids), default=0) < 2**31, "categories of ids of 32 bits"),
            ("categories", self.model != "rpn" or len(ids) == 1, "one category, the object, for an rpn"),
            ("min_size", self.min_size <= self.max_size, f"at most max_size ({self.max_size})"),
            ("size_divisor", self.size_divisor == 32, "32, the stride of C5"),
            ("image_mean", len(self.image_mean) == 3, "three numbers"),
            ("image_std", len(self.image_std) == 3 and min(self.image_std) > 0, "three positive numbers"),
            ("levels", _consecutive(self.levels, LEVELS), "consecutive levels of 2..7, finest first"),
            ("levels", self.pyramid != "none" or self._is_one_stage, "one level of 2..5 where pyramid is none"),
            ("box_head", self.box_head != "conv5" or self._is_c4, "two_mlp unless pyramid is none and levels are (4,)"),
            ("roi_levels", _consecutive(self.roi_levels, self.levels), f"consecutive and among {self.levels}"),
            ("anchor_sizes", len(self.anchor_sizes) == len(self.levels), f"one tuple for each of {self.levels}"),
            ("anchor_sizes", len({len(sizes) for sizes in self.anchor_sizes}) == 1, "equally many on every level"),
            ("anchor_sizes", min(sides, default=0) > 0, "positive pixels"),
            ("box_detections_per_img", self.box_detections_per_img <= MAX_DETECTIONS, f"at most {MAX_DETECTIONS}"),
            ("aspect_ratios", min(self.aspect_ratios, default=0) > 0, "positive, and at least one"),
            (
                "bbox_reg_weights",
                len(self.bbox_reg_weights) == 4 and min(self.bbox_reg_weights) > 0,
                "four positive numbers",
            ),
            ("box_roi_pool", pool.output_size >= 1 and pool.sampling_ratio >= 0, "of positive output_size"),
            *((name, getattr(self, name) >= 1, "at least 1") for name in _POSITIVE),
            *((name, 0.0 <= getattr(self, name) <= 1.0, "a number from 0 to 1") for name in _FRACTIONS),
        ):
            _require(ok, name, allowed, getattr(self, name))

    @property
    def num_classes(self) -> int:
        """Outputs of the classifier: the categories and background."""
        return len(self.categories) + 1

    @property
    def num_anchors(self) -> int:
        """Anchors per location, the same on every level."""
        return len(self.anchor_sizes[0]) * len(self.aspect_ratios)

    @property
    def has_rpn(self) -> bool:
        return self.model != "fast_rcnn"

    @property
    def has_box_head(self) -> bool:
        return self.model != "rpn"

    @property
    def head_names(self) -> tuple[str, ...]:
        """The networks behind the trunk: the box head."""
        return ("head",) if self.has_box_head else ()

    @property
    def most_candidates(self) -> int:
        """Boxes per image that can be detections: each proposal may be one of every class."""
        return self.rpn_post_nms_top_n_test * len(self.categories)

    @property
    def coarsest_stage(self) -> int:
        """The last stage of the ResNet that is computed: 5, or the last level where none reads beyond it."""
        return COARSEST_STAGE if self.pyramid in ("fpn", "top_down") else min(self.levels[-1], COARSEST_STAGE)

    @property
    def stage_channels(self) -> tuple[int, ...]:
        """Channels of c2..c5; of the paper's ResNets 256, 512, 1024, 2048."""
        expansion = 4 if self.arch in BOTTLENECKS else 1
        return tuple(self.body_width * expansion * 2**i for i in range(4))

    @property
    def feature_channels(self) -> int:
        """Channels of the maps that the RPN and the RoIs see: the pyramid's, or those of the one stage."""
        return self.fpn_channels if self.pyramid != "none" else self.stage_channels[self.levels[0] - FINEST_STAGE]

    @property
    def level_names(self) -> tuple[str, ...]:
        """What the maps of ``levels`` are called: p2, p3, ..., or c4 where there is no pyramid."""
        return tuple(f"{'c' if self.pyramid == 'none' else 'p'}{level}" for level in self.levels)

    @property
    def _is_one_stage(self) -> bool:
        return len(self.levels) == 1 and self.levels[0] <= COARSEST_STAGE

    @property
    def _is_c4(self) -> bool:
        return self.pyramid == "none" and self.levels == (4,)

    @property
    def strides(self) -> tuple[int, ...]:
        """Nominal stride of each level in pixels, finest first: 4, 8, 16, 32, 64."""
        return tuple(2**level for level in self.levels)

    def describe_features(self) -> str:
        """What the RPN and the RoIs see, in words: "pyramid of 256 channels", "C4 of 1024 channels"."""
        if self.pyramid == "none":
            return f"C{self.levels[0]} of {self.feature_channels} channels"
        kind = "" if self.pyramid == "fpn" else f"{self.pyramid} "
        return f"{kind}pyramid of {self.fpn_channels} channels"

    def describe_results(self) -> str:
        """What comes out, for people: 91 classes."""
        return f"{len(self.categories)} classes"

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Self:
        known = {f.name: f for f in dataclasses.fields(cls)}
        try:
            return cls(**{name: _convert(known[name], value) for name, value in values.items()})
        except SpecError:
            raise
        except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            raise SpecError(f"the model specification has a value of the wrong form: {error}") from None


OBJECT = Category(id=1, name="object")  # the one category of an RPN alone


def numbered_categories(count: int) -> tuple[Category, ...]:
    """Categories 1..count named class_1.. for a checkpoint that brings no names."""
    return tuple(Category(id=i, name=f"class_{i}") for i in range(1, count + 1))


def _require(ok: bool, name: str, allowed: str, given: object) -> None:
    if not ok:
        raise SpecError(f"{name} must be {allowed}, not {given!r}")


def _consecutive(levels: tuple[int, ...], among: Sequence[int]) -> bool:
    return len(levels) >= 1 and set(levels) <= set(among) and all(b == a + 1 for a, b in pairwise(levels))


def _require_one_of(name: str, given: str, allowed: Sequence[str]) -> None:
    _require(given in allowed, name, "one of " + ", ".join(allowed), given)


def _known_keys(cls: type, values: Mapping[str, Any]) -> Mapping[str, Any]:
    unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
    if unknown:
        raise SpecError(f"unknown key {unknown[0]!r} in the model specification's {cls.__name__}")
    return values


def _categories(values: Sequence[Any]) -> tuple[Category, ...]:
    pairs = ((v["id"], v["name"]) if isinstance(v, Mapping) else v for v in values)
    return tuple(Category(id=whole_number(number), name=str(name)) for number, name in pairs)


def _floats(values: Sequence[Any]) -> tuple[float, ...]:
    return tuple(finite_number(v) for v in values)


def _ints(values: Sequence[Any]) -> tuple[int, ...]:
    return tuple(whole_number(v) for v in values)


def _pooling(values: Mapping[str, Any]) -> RoIPoolSpec:
    known = {f.name: _CONVERT_SCALAR[str(f.type)] for f in dataclasses.fields(RoIPoolSpec)}
    return RoIPoolSpec(**{name: known[name](value) for name, value in _known_keys(RoIPoolSpec, values).items()})


def _convert(known: dataclasses.Field[Any], value: Any) -> Any:
    return convert_value(known.name, _CONVERT.get(known.name) or _CONVERT_SCALAR[str(known.type)], value)


_CONVERT: dict[str, Any] = {
    "categories": _categories,
    "image_mean": _floats,
    "image_std": _floats,
    "levels": _ints,
    "roi_levels": _ints,
    "anchor_sizes": lambda values: tuple(_floats(sizes) for sizes in values),
    "aspect_ratios": _floats,
    "bbox_reg_weights": _floats,
    "box_roi_pool": _pooling,
}
_CONVERT_SCALAR: dict[str, Any] = {"int": whole_number, "float": finite_number, "str": str, "bool": truth_value}

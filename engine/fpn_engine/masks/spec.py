"""MaskSpec: all about a mask-proposal model that its tensors do not say (Lin et al. 2017, sec. 6 and appendix A)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from fpn_engine.errors import SpecError
from fpn_engine.spec import OBJECT, Category, ModelSpec
from fpn_engine.spec_json import JsonSpec, convert_value, finite_number, parse_spec_json, whole_number

MODEL = "fpn_masks"
FINEST_LEVEL, COARSEST_LEVEL = 2, 6
MAX_KERNEL = 15
MAX_SIDE = 1 << 16  # more pixels than any mask or region has; keeps a crafted file from asking for memory


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskHead:
    """One MLP on ``kernel`` x ``kernel`` windows of every level.

    ``octave`` is how far its objects are above the level's canonical size, in powers of two: 0.5 for half octaves.
    """

    kernel: int
    octave: float = 0.0


FIVE = MaskHead(kernel=5)
SEVEN = MaskHead(kernel=7, octave=0.5)  # 7 is about 5 sqrt(2), so windows and objects grow alike


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskSpec(JsonSpec):
    """The whole contract of a mask-proposal model. The defaults are the paper's: both MLPs, 14x14 masks, ResNet-50.

    An object of scale s, the larger of its width and height, belongs to the head and level whose
    :meth:`object_size` is nearest in log space. A mask covers a square of :meth:`region_size` around its location:
    cell (y, x) of level k lies at (x 2^k, y 2^k) pixels, as anchors do. What MaskSpec shares with ModelSpec means the
    same there. Sizes are pixels of the resized image.

    Attributes:
        model: always "fpn_masks"; tells its JSON from a ModelSpec's.
        fpn_channels: d. hidden_channels: of each MLP. heads: the MLPs, in the order of the score maps' channels.
        mask_size: side of a mask in cells, 14 or 28 in table 6.
        canonical_level, canonical_size: a head of octave 0 finds objects of this size on this level, twice as large on
            the next.
        padding: share of the object's size that a region has more; 0.25 makes regions of 40..640.
        masks_per_img: proposals per image, over all levels and heads. mask_thresh: probability of a pixel of the mask.

    Raises: SpecError (a ValueError) for a value outside its range, and from ``from_dict`` for unknown keys.
    """

    model: str = MODEL
    arch: str = "resnet50"
    body_width: int = 64
    fpn_channels: int = 128
    hidden_channels: int = 512
    heads: tuple[MaskHead, ...] = (FIVE, SEVEN)
    mask_size: int = 14
    levels: tuple[int, ...] = (2, 3, 4, 5, 6)
    canonical_level: int = 2
    canonical_size: int = 32
    padding: float = 0.25

    min_size: int = 800
    max_size: int = 1333
    size_divisor: int = 32
    image_mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    image_std: tuple[float, ...] = (0.229, 0.224, 0.225)
    channel_order: str = "rgb"

    masks_per_img: int = 1000
    mask_thresh: float = 0.5

    batch_norm_eps: float = 1e-5
    source: str = ""

    def __post_init__(self) -> None:
        _ = self.backbone  # checks what is shared
        for name, ok, allowed in (
            ("model", self.model == MODEL, MODEL),
            ("hidden_channels", self.hidden_channels >= 1, "at least 1"),
            ("heads", len(self.heads) >= 1, "at least one head"),
            ("heads", all(_is_window(head.kernel) for head in self.heads), f"of odd kernels from 1 to {MAX_KERNEL}"),
            ("heads", all(abs(head.octave) <= 4 for head in self.heads), "of octaves from -4 to 4"),
            ("heads", len({head.octave for head in self.heads}) == len(self.heads), "of distinct octaves"),
            ("mask_size", 1 <= self.mask_size <= MAX_SIDE, f"from 1 to {MAX_SIDE}"),
            ("levels", self.levels[-1] <= COARSEST_LEVEL, "consecutive levels of 2..6, finest first"),
            ("levels", self.levels[0] < COARSEST_LEVEL, "levels that begin at 5 or finer"),
            ("canonical_size", 1 <= self.canonical_size <= MAX_SIDE, f"from 1 to {MAX_SIDE}"),
            ("canonical_level", FINEST_LEVEL <= self.canonical_level <= COARSEST_LEVEL, "from 2 to 6"),
            ("padding", 0 <= self.padding <= 4, "from 0 to 4"),
            ("masks_per_img", self.masks_per_img >= 1, "at least 1"),
            ("mask_thresh", 0 < self.mask_thresh < 1, "between 0 and 1"),
        ):
            if not ok:
                raise SpecError(f"{name} must be {allowed}, not {getattr(self, name)!r}")

    @property
    def backbone(self) -> ModelSpec:
        """What bottom-up network, pyramid and preprocessing are, as an RPN's spec on the same levels."""
        return _read_shared({name: getattr(self, name) for name in SHARED})

    @property
    def has_rpn(self) -> bool:
        """It proposes by itself: nothing is given to it."""
        return True

    @property
    def has_box_head(self) -> bool:
        return False

    @property
    def head_names(self) -> tuple[str, ...]:
        """The networks behind the trunk: the MLPs, each on the windows of its winners."""
        return tuple(f"head{number}" for number in range(len(self.heads)))

    @property
    def most_candidates(self) -> int:
        """Beyond so many per image there is nothing to report."""
        return self.masks_per_img

    @property
    def feature_channels(self) -> int:
        """Width of the levels."""
        return self.fpn_channels

    def describe_features(self) -> str:
        """The pyramid, for people."""
        return self.backbone.describe_features()

    def describe_results(self) -> str:
        """What comes out, for people: masks of 14 x 14 by 5x5 and 7x7 windows."""
        windows = " and ".join(f"{head.kernel}x{head.kernel}" for head in self.heads)
        return f"masks of {self.mask_size} x {self.mask_size} by {windows} windows"

    @property
    def categories(self) -> tuple[Category, ...]:
        """Proposals have no class: all are "object"."""
        return (OBJECT,)

    @property
    def strides(self) -> tuple[int, ...]:
        """Stride of each level in pixels, finest first: 4, 8, 16, 32, 64."""
        return tuple(2**level for level in self.levels)

    @property
    def level_names(self) -> tuple[str, ...]:
        return tuple(f"p{level}" for level in self.levels)

    def object_size(self, head: MaskHead, level: int) -> float:
        """Scale of the objects that ``head`` finds on ``level``: 32..512 for the first, sqrt(2) more for the second."""
        return self.canonical_size * 2.0 ** (level - self.canonical_level + head.octave)

    def region_size(self, head: MaskHead, level: int) -> float:
        """Side of the square that a mask covers: 40..640, sqrt(2) more for the second head."""
        return (1 + self.padding) * self.object_size(head, level)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Self:
        shared = _read_shared({name: values[name] for name in SHARED if name in values})
        own = {name: convert_value(name, _CONVERT[name], v) for name, v in values.items() if name not in SHARED}
        return cls(**{name: getattr(shared, name) for name in SHARED if name in values}, **own)


AnySpec = ModelSpec | MaskSpec

# Fields that ModelSpec has too; it converts and checks them.
SHARED = (
    "arch",
    "body_width",
    "fpn_channels",
    "levels",
    "min_size",
    "max_size",
    "size_divisor",
    "image_mean",
    "image_std",
    "channel_order",
    "batch_norm_eps",
    "source",
)


def read_spec(values: Mapping[str, Any]) -> AnySpec:
    """The spec of either kind that JSON values hold. Raises SpecError as both do."""
    kind = MaskSpec if isinstance(values, Mapping) and values.get("model") == MODEL else ModelSpec
    return kind.from_dict(values)


def read_spec_json(text: str) -> AnySpec:
    """:func:`read_spec` of what ``to_json`` wrote."""
    return read_spec(parse_spec_json(text))


def _read_shared(values: Mapping[str, Any]) -> ModelSpec:
    """A ModelSpec with these values; of its own fields those that depend on the levels follow them."""
    levels = values.get("levels", (2, 3, 4, 5, 6))
    count = len(levels) if isinstance(levels, Sequence) else 0
    own = {
        "model": "rpn",
        "categories": [dataclasses.asdict(OBJECT)],
        "roi_levels": levels,
        "anchor_sizes": [[32.0]] * count,
        "fpn_channels": 128,
    }
    return ModelSpec.from_dict(own | dict(values))


def _is_window(kernel: int) -> bool:
    return kernel % 2 == 1 and 1 <= kernel <= MAX_KERNEL


def _read_head(value: Mapping[str, Any]) -> MaskHead:
    unknown = sorted(set(value) - {"kernel", "octave"})
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r} in a head")
    return MaskHead(kernel=whole_number(value["kernel"]), octave=finite_number(value.get("octave", 0.0)))


_CONVERT: dict[str, Any] = {
    "model": str,
    "hidden_channels": whole_number,
    "heads": lambda values: tuple(_read_head(value) for value in values),
    "mask_size": whole_number,
    "canonical_level": whole_number,
    "canonical_size": whole_number,
    "padding": finite_number,
    "masks_per_img": whole_number,
    "mask_thresh": finite_number,
}

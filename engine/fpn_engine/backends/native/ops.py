"""The operations of a network as plain data: what a plan stores and an executor runs.

Every value is (N, H, W, C), dense, or rows (R, F). Convolutions are those of He et al. 2016 with all that follows them
in one: bias, residual and activation; a residual that is upsampled first makes it a lateral connection with its
top-down addition (Lin et al. 2017, sec. 3, fig. 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

FLOAT32, FLOAT16, BFLOAT16 = "float32", "float16", "bfloat16"
DTYPES = (FLOAT32, FLOAT16, BFLOAT16)
UINT8, INT8 = "uint8", "int8"  # of quantised values and weights; see fpn_engine.backends.native.quantized
ANY = (*DTYPES, UINT8)  # of operations that hand numbers on as they are
ACTIVATIONS = ("none", "relu", "clip", "sigmoid", "hardswish")
UNIT = (1, 1)
STORED = ("weight", "bias", "scale", "shift")  # fields that name stored tensors

Pair = tuple[int, int]
Padding = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """An elementwise function.

    ``low`` and ``high`` are the bounds of "clip"; "hardswish" is x clip(x + 3, 0, 6) / 6.
    """

    kind: str = "none"
    low: float = 0.0
    high: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ACTIVATIONS:
            raise ValueError(f"an activation is one of {', '.join(ACTIVATIONS)}, not {self.kind!r}")


def _require_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"a number type is one of {', '.join(DTYPES)}, not {dtype!r}")


NONE, RELU = Activation(), Activation(kind="relu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One step: reads ``inputs``, makes ``output``; every name is made once.

    ``KIND`` is its name in a plan. ``IN_PLACE`` are the inputs that an executor may overwrite with the output, the best
    first. ``VIEW`` says that the output is the input's memory. ``TAKES`` are the number types of its inputs.
    """

    KIND: ClassVar[str]
    TAKES: ClassVar[tuple[str, ...]] = DTYPES
    IN_PLACE: ClassVar[tuple[int, ...]] = ()
    VIEW: ClassVar[bool] = False
    ARITY: ClassVar[tuple[int, int]] = (1, 1)

    inputs: tuple[str, ...]
    output: str

    def __post_init__(self) -> None:
        fewest, most = self.ARITY
        if not fewest <= len(self.inputs) <= most:
            raise ValueError(f"{self.KIND} has {len(self.inputs)} inputs")

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of the stored tensors that it reads."""
        names = (getattr(self, field, None) for field in STORED)
        return tuple(name for name in names if name is not None)

    @property
    def in_place(self) -> tuple[int, ...]:
        """Indices of the inputs that may be overwritten with the output."""
        return self.IN_PLACE

    @property
    def result_dtype(self) -> str | None:
        """The output's number type, None if it is the inputs'."""
        return getattr(self, "dtype", None)

    def tensor_dtypes(self, dtype: str) -> dict[str, str]:
        """The number type of each stored tensor where inputs are of ``dtype``."""
        return dict.fromkeys(self.weights, dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Convolution(Op):
    """Convolution of any number type, bias, the residual ``inputs[1]`` upsampled by ``upsample``, activation, as one.

    ``weight`` is (O, kH, kW, C / groups), ``bias`` (O,). ``padding`` is top, left, bottom, right.
    """

    ARITY: ClassVar[tuple[int, int]] = (1, 2)

    weight: str
    bias: str | None = None
    stride: Pair = UNIT
    padding: Padding = (0, 0, 0, 0)
    dilation: Pair = UNIT
    groups: int = 1
    upsample: Pair = UNIT
    activation: Activation = NONE

    @property
    def in_place(self) -> tuple[int, ...]:
        return (1,) if len(self.inputs) == 2 and self.upsample == UNIT else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Conv(Convolution):
    """Convolution of floating-point numbers.

    ``dtype`` is the number type of the result where it is not the input's: sums are float32 anyway, and need not be
    rounded.
    """

    KIND: ClassVar[str] = "conv"

    dtype: str | None = None

    def __post_init__(self) -> None:
        super(Conv, self).__post_init__()  # a dataclass with slots is another class than super() knows
        _require_dtype(self.dtype)

    @property
    def in_place(self) -> tuple[int, ...]:
        return super(Conv, self).in_place if self.dtype is None else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear(Op):
    """Rows (R, F) times ``weight`` (O, F) transposed, plus ``bias`` (O,), then the activation; ``dtype`` as of Conv."""

    KIND: ClassVar[str] = "linear"

    weight: str
    bias: str | None = None
    activation: Activation = NONE
    dtype: str | None = None

    def __post_init__(self) -> None:
        super(Linear, self).__post_init__()
        _require_dtype(self.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowScore(Op):
    """Scores of an MLP that slides over all ``inputs``, its hidden channels stored nowhere (Lin et al. 2017, sec. 6).

    The sum of ``scale`` times relu(convolution of ``weight`` and ``bias``), plus ``shift``, at every cell: (N, M, 1, 1)
    for the M cells of the inputs one after another, rows first. ``weight`` is (O, k, k, C), k odd, zeros around;
    ``bias`` and ``scale`` are (O,), ``shift`` is (1,).
    """

    KIND: ClassVar[str] = "window_score"
    ARITY: ClassVar[tuple[int, int]] = (1, 16)

    weight: str
    scale: str
    bias: str | None = None
    shift: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MaxPool(Op):
    """Maxima of windows, floor of the output size; padding never wins."""

    KIND: ClassVar[str] = "max_pool"
    TAKES: ClassVar[tuple[str, ...]] = ANY

    kernel: Pair
    stride: Pair = UNIT
    padding: Padding = (0, 0, 0, 0)
    dilation: Pair = UNIT


@dataclass(frozen=True, slots=True, kw_only=True)
class AveragePool(Op):
    """Means of windows, floor of the output size; ``count_padding`` counts the zeros around."""

    KIND: ClassVar[str] = "average_pool"

    kernel: Pair
    stride: Pair = UNIT
    padding: Padding = (0, 0, 0, 0)
    count_padding: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalAveragePool(Op):
    """Means over H and W: (N, 1, 1, C)."""

    KIND: ClassVar[str] = "global_average_pool"


@dataclass(frozen=True, slots=True, kw_only=True)
class Add(Op):
    """``inputs[0]`` plus ``inputs[1]`` upsampled by ``upsample``, then the activation.

    Not upsampled, the second may be (N, 1, 1, C).
    """

    KIND: ClassVar[str] = "add"
    IN_PLACE: ClassVar[tuple[int, ...]] = (0, 1)
    ARITY: ClassVar[tuple[int, int]] = (2, 2)

    upsample: Pair = UNIT
    activation: Activation = NONE


@dataclass(frozen=True, slots=True, kw_only=True)
class Mul(Op):
    """Elementwise product; the second factor may be (N, 1, 1, C)."""

    KIND: ClassVar[str] = "mul"
    IN_PLACE: ClassVar[tuple[int, ...]] = (0, 1)
    ARITY: ClassVar[tuple[int, int]] = (2, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Affine(Op):
    """x * ``scale`` + ``shift`` per channel, each (C,), then the activation."""

    KIND: ClassVar[str] = "affine"
    IN_PLACE: ClassVar[tuple[int, ...]] = (0,)

    scale: str
    shift: str
    activation: Activation = NONE


@dataclass(frozen=True, slots=True, kw_only=True)
class Activate(Op):
    """The activation alone."""

    KIND: ClassVar[str] = "activate"
    IN_PLACE: ClassVar[tuple[int, ...]] = (0,)

    activation: Activation


@dataclass(frozen=True, slots=True, kw_only=True)
class Upsample(Op):
    """Nearest neighbour: output (y, x) is input (y // factor[0], x // factor[1])."""

    KIND: ClassVar[str] = "upsample"
    TAKES: ClassVar[tuple[str, ...]] = ANY

    factor: Pair


@dataclass(frozen=True, slots=True, kw_only=True)
class Concat(Op):
    """Along the channels."""

    KIND: ClassVar[str] = "concat"
    ARITY: ClassVar[tuple[int, int]] = (1, 1 << 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice(Op):
    """Channels ``start`` to ``stop``, a view that is not dense: only as an output of the program."""

    KIND: ClassVar[str] = "slice"
    VIEW: ClassVar[bool] = True

    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Flatten(Op):
    """(N, H, W, C) as rows (N, H * W * C)."""

    KIND: ClassVar[str] = "flatten"
    TAKES: ClassVar[tuple[str, ...]] = ANY
    VIEW: ClassVar[bool] = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Unflatten(Op):
    """Rows (R, height * width * C) as (R, height, width, C)."""

    KIND: ClassVar[str] = "unflatten"
    TAKES: ClassVar[tuple[str, ...]] = ANY
    VIEW: ClassVar[bool] = True

    height: int
    width: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cast(Op):
    """Another number type."""

    KIND: ClassVar[str] = "cast"

    dtype: str

    def __post_init__(self) -> None:
        super(Cast, self).__post_init__()
        _require_dtype(self.dtype)


OPS: tuple[type[Op], ...] = (
    Conv,
    Linear,
    WindowScore,
    MaxPool,
    AveragePool,
    GlobalAveragePool,
    Add,
    Mul,
    Affine,
    Activate,
    Upsample,
    Concat,
    Slice,
    Flatten,
    Unflatten,
    Cast,
)

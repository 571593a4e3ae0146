"""Pieces of work of a detector, and the GPU that they are for."""

from __future__ import annotations

from typing import Any

from fpn_engine.backends.native.cuda.gpu import Gpu
from fpn_engine.backends.native.cuda.work import Work
from fpn_engine.backends.native.ops import BFLOAT16, FLOAT16, FLOAT32, NONE, RELU

H200 = Gpu(name="NVIDIA H200", capability=90, processors=132, shared_bytes=227 << 10)


def conv(
    h: int, w: int, c: int, o: int, kernel: int = 1, stride: int = 1, dtype: str = FLOAT16, n: int = 1, **changes: Any
) -> Work:
    """A square window with the padding that keeps the size."""
    pad = kernel // 2
    out = (n, (h + 2 * pad - kernel) // stride + 1, (w + 2 * pad - kernel) // stride + 1, o)
    values: dict[str, Any] = {
        "x": (n, h, w, c),
        "weight": (o, kernel, kernel, c),
        "out": out,
        "stride": (stride, stride),
        "padding": (pad,) * 4,
        "activation": RELU,
        "dtype": dtype,
        "out_dtype": dtype,
    }
    return Work(**values | changes)


def linear(rows: int, features: int, out: int, dtype: str = FLOAT16, **changes: Any) -> Work:
    shapes: dict[str, Any] = {"x": (rows, features), "weight": (out, features), "out": (rows, out)}
    return Work(**{**shapes, "activation": RELU, "dtype": dtype, "out_dtype": dtype} | changes)


# What R50-FPN has at 800 x 1216: stem, blocks, laterals, outputs, RPN and box head.
REAL = {
    "stem": conv(800, 1216, 3, 64, 7, 2),
    "layer1 1x1": conv(200, 304, 64, 256, has_residual=True),
    "layer1 3x3": conv(200, 304, 64, 64, 3),
    "layer3 1x1": conv(50, 76, 256, 1024, has_residual=True),
    "layer4 1x1": conv(25, 38, 2048, 512),
    "layer4 3x3": conv(25, 38, 512, 512, 3),
    "downsample": conv(50, 76, 1024, 2048, stride=2, activation=NONE),
    "lateral": conv(100, 152, 512, 256, has_residual=True, upsample=(2, 2), activation=NONE),
    "output": conv(200, 304, 256, 256, 3, activation=NONE),
    "rpn": conv(200, 304, 256, 256, 3),
    "rpn head": conv(200, 304, 256, 15, activation=NONE, out_dtype=FLOAT32),
    "grouped": conv(50, 76, 512, 512, 3, groups=32, weight=(512, 3, 3, 16)),
    "fc6": linear(1000, 12544, 1024),
    "predictor": linear(1000, 1024, 455, activation=NONE, out_dtype=FLOAT32),
}
SMALL = {
    "stem": conv(10, 12, 3, 8, 3, 2),
    "stem of bfloat16": conv(9, 11, 3, 8, 7, 2, dtype=BFLOAT16),
    "stem to float32": conv(9, 11, 1, 8, 3, padding=(0, 0, 1, 1), out=(1, 8, 10, 8), out_dtype=FLOAT32),
    "residual": conv(4, 6, 64, 16, has_residual=True),
    "lateral": conv(4, 6, 64, 16, has_residual=True, upsample=(2, 2), activation=NONE),
    "window": conv(4, 6, 64, 16, 3, n=2),
    "ragged": conv(4, 6, 40, 16),
    "to float32": conv(4, 6, 64, 15, activation=NONE, out_dtype=FLOAT32, has_bias=False),
    "strided": conv(5, 7, 64, 16, stride=2),
    "bfloat16": conv(4, 6, 64, 16, has_residual=True, dtype=BFLOAT16),
    "float32": conv(4, 6, 40, 16, 3, dtype=FLOAT32),
    "grouped": conv(4, 6, 16, 16, 3, groups=4, weight=(16, 3, 3, 4)),
    "uneven": conv(4, 6, 64, 16, 3, padding=(0, 0, 2, 2)),
    "rows": linear(5, 128, 16),
    "rows to float32": linear(5, 128, 13, activation=NONE, out_dtype=FLOAT32),
}

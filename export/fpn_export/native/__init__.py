"""Building for the native backend: an ONNX graph to fused operations in a number type."""

from fpn_export.native.fusion import fuse
from fpn_export.native.operators import lower
from fpn_export.native.precision import in_bfloat16, in_float32, in_half, in_int8

__all__ = ["fuse", "in_bfloat16", "in_float32", "in_half", "in_int8", "lower"]

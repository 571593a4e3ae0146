"""The native backend: a network as a short list of fused operations over NHWC buffers in one planned arena."""

from fpn_engine.backends.native.loading import load_native
from fpn_engine.backends.native.parts import NativeHead, NativeTrunk

__all__ = ["NativeHead", "NativeTrunk", "load_native"]

"""TensorRT: trunk and head as engines that run on the caller's stream, between kernels that are ours."""

from fpn_engine.backends.tensorrt.parts import load_tensorrt

__all__ = ["load_tensorrt"]

"""The native backend on CUDA: several implementations of each heavy operation, the fastest of them per shape."""

from fpn_engine.backends.native.cuda.executor import CudaExecutor

__all__ = ["CudaExecutor"]

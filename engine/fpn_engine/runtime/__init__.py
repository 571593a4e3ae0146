"""The runtime: how groups of images get to the device, through the pipeline and back."""

from __future__ import annotations

from collections.abc import Sequence

from fpn_engine.runtime.lanes import Lanes
from fpn_engine.runtime.runner import AnyPipeline, EagerRunner
from fpn_engine.tasks import Runner


def make_runner(
    pipelines: Sequence[AnyPipeline], batch_size: int, *, graphs: bool = True, graph_memory: int | None = None
) -> Runner:
    """What runs groups of images on the pipelines' device: at once on the CPU, captured on CUDA.

    A part whose ``captures`` is False runs operation by operation on CUDA too: those of ONNX Runtime take memory and
    free it as they run, by an allocator that knows no capture.

    Args: see :class:`fpn_engine.engine.Engine`.
    """
    runners: list[Runner]
    if graphs and pipelines[0].device.type == "cuda" and all(pipeline.captures for pipeline in pipelines):
        from fpn_engine.runtime.cuda import make_cuda_runner

        number = len(pipelines)
        runners = [
            make_cuda_runner(pipeline, batch_size=batch_size, graph_memory=graph_memory, lanes=number)
            for pipeline in pipelines
        ]
    else:
        runners = [EagerRunner(pipeline) for pipeline in pipelines]
    return runners[0] if len(runners) == 1 else Lanes(runners)

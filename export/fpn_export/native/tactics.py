"""The part of a CUDA plan that says which tactics to run: measured here, or left to the first load elsewhere."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fpn_engine.backends.native.packing import TACTICS
from fpn_engine.errors import BackendError
from fpn_engine.masks.spec import AnySpec
from fpn_engine.resizing import padded_size, resized_size

ORDINARY = (480, 640)  # the shape of most photographs
Shape = tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneFor:
    """What a plan for CUDA is tuned for.

    Attributes:
        target: a compute capability such as "sm_90" of a GPU that is not here, empty for the one that is.
        level: "quick" or "full", how much is measured. seconds: after which no further layer is begun.
        shapes: batch, padded height and width; none takes one ordinary photograph.
    """

    target: str = ""
    level: str = "quick"
    shapes: tuple[Shape, ...] = ()
    seconds: float | None = None

    def describe(self) -> dict[str, Any]:
        """What the plan depends on."""
        gpu = self.target or f"{torch.cuda.get_device_name()} {torch.cuda.get_device_capability()}"
        return {"gpu": gpu, "tactics": self.level, "shapes": self.shapes}


def make_tactics(
    parts: dict[str, bytes],
    spec: AnySpec,
    tune_for: TuneFor,
    on_progress: Callable[[str], None],
    on_note: Callable[[str], None],
) -> dict[str, str]:
    """Add the tactics to the ``parts`` of trunk and head; returns what the manifest says of the GPU.

    Raises: BackendError for a target that is not known or a shape that the model does not take.
    """
    if importlib.util.find_spec("triton") is None:
        raise BackendError("Triton is not installed, which plans for CUDA need; pip install triton")
    from fpn_engine.backends.native.cuda.choices import TunedTactics
    from fpn_engine.backends.native.cuda.gpu import Gpu
    from fpn_engine.backends.native.cuda.loading import find_work, tune_here

    d = spec.size_divisor
    for shape in tune_for.shapes:
        if min(shape) < 1 or shape[1] % d or shape[2] % d:
            raise BackendError(f"there is nothing to tune for {'x'.join(map(str, shape))}; sides are multiples of {d}")
    shapes = tune_for.shapes or ((1, *ordinary_size(spec)),)
    tuned = TunedTactics(level=tune_for.level, shapes=shapes)
    if tune_for.target:
        gpu = Gpu.of_target(tune_for.target)
        on_note(f"tactics are measured when the plan is first loaded on a GPU of {tune_for.target}")
    else:
        gpu = Gpu.of_device(torch.device("cuda", torch.cuda.current_device()))
        tuning = tune_here(find_work(parts, spec, tuned), tune_for.level, tune_for.seconds, on_progress)
        name = gpu.name if tuning.is_complete else ""  # else the next load measures the rest
        tuned = TunedTactics(gpu=name, level=tune_for.level, shapes=shapes, tactics=tuning.tactics)
        for note in tuning.notes:
            on_note(note)
        on_note(f"{len(tuning.timed)} layers tuned for {gpu.name}, {tuning.measured} of them measured now")
    parts[TACTICS] = tuned.to_json()
    described = {"compute capability": f"{gpu.capability // 10}.{gpu.capability % 10}"}
    return described | ({"gpu": gpu.name} if gpu.name else {})


def ordinary_size(spec: AnySpec) -> tuple[int, int]:
    """Padded sides of an ordinary photograph."""
    return padded_size(resized_size(*ORDINARY, spec.min_size, spec.max_size), spec.size_divisor)

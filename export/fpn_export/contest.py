"""A contest: which backend runs a trunk faster on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from fpn_engine.backends.native.masks import NativeMaskTrunk
from fpn_engine.backends.native.parts import NativeTrunk
from fpn_engine.backends.native.program import Program
from fpn_engine.backends.ort import OrtTrunk
from fpn_engine.backends.ort_masks import OrtMaskTrunk
from fpn_engine.masks.spec import AnySpec, MaskSpec
from fpn_engine.resizing import padded_size, resized_size

PICTURE = (480, 640)  # the shape of most photographs; it is run at half the size that the model takes them at
SECONDS = 2.0  # after which no further round begins
FEWEST_ROUNDS, MOST_ROUNDS = 3, 10

RunTrunk = Callable[[torch.Tensor], object]  # images to whatever it makes of them


class Verdict(NamedTuple):
    """The backend to take, and a line for people that says why."""

    backend: str
    reason: str


def open_trunks(onnx: bytes, native: tuple[Program, Mapping[str, torch.Tensor]], spec: AnySpec) -> dict[str, RunTrunk]:
    """A model's trunk on ONNX Runtime and on the native backend."""
    if isinstance(spec, MaskSpec):
        return {"onnxruntime": OrtMaskTrunk(onnx, spec), "native": NativeMaskTrunk(*native, spec)}
    return {"onnxruntime": OrtTrunk(onnx, spec), "native": NativeTrunk(*native, spec)}


def hold_contest(
    trunks: Mapping[str, RunTrunk], spec: AnySpec, clock: Callable[[], float] = time.perf_counter
) -> Verdict:
    """Run the trunks in turns on one image; the one with the shortest run wins.

    Whatever else the machine does makes runs longer and never shorter, so the shortest says most; turns meet the same
    disturbances. The first run of each, in which memory is made, does not count.
    """
    height, width = contest_size(spec)
    images = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    for trunk in trunks.values():
        trunk(images)
    best = dict.fromkeys(trunks, float("inf"))
    begin = clock()
    for number in range(MOST_ROUNDS):
        if number >= FEWEST_ROUNDS and clock() - begin > SECONDS:
            break
        for name, trunk in trunks.items():
            start = clock()
            trunk(images)
            best[name] = min(best[name], clock() - start)
    winner = min(best, key=lambda name: best[name])
    times = ", ".join(f"{name} {seconds * 1000:.1f} ms" for name, seconds in best.items())
    return Verdict(winner, f"taking {winner}: the trunk at {height}x{width} took {times}")


def contest_size(spec: AnySpec) -> tuple[int, int]:
    """Half the padded sides of an ordinary photograph, multiples of the size divisor."""
    h, w = padded_size(resized_size(*PICTURE, spec.min_size, spec.max_size), spec.size_divisor)
    d = spec.size_divisor
    return max(d, h // 2 // d * d), max(d, w // 2 // d * d)

"""What an engine was built for: TensorRT's version and the GPU, compared before anything of it is read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

from fpn_engine.errors import PlanError

Hardware = Literal["none", "same_compute_capability", "ampere_plus"]
HARDWARE: tuple[Hardware, ...] = get_args(Hardware)
AMPERE = (8, 0)
VERSION_KEY = "tensorrt"  # in the manifest's versions


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU by name and compute capability, (9, 0) for an H200."""

    name: str
    capability: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.capability[0]}.{self.capability[1]})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where the engines of a plan run.

    Attributes:
        version: TensorRT's, all four numbers. gpu: the one that they were built on.
        version_compatible: other versions of TensorRT may run them, through the lean runtime of theirs.
        hardware: "none" for this GPU alone, else TensorRT's hardware compatibility level.
        shapes: for each part the smallest, best and largest input of each optimisation profile.
    """

    version: str
    gpu: Gpu
    version_compatible: bool = False
    hardware: Hardware = "none"
    shapes: dict[str, list[list[list[int]]]] = dataclasses.field(default_factory=dict)

    def to_json(self) -> bytes:
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Raises ValueError for anything that :meth:`to_json` does not write."""
        values = json.loads(data)
        if not isinstance(values, dict) or set(values) != {field.name for field in dataclasses.fields(cls)}:
            raise ValueError("it has other keys")
        if values["hardware"] not in HARDWARE or not isinstance(values["version_compatible"], bool):
            raise ValueError("it has a wrong compatibility")
        gpu = _gpu(values["gpu"])
        return cls(**{**values, "version": str(values["version"]), "gpu": gpu, "shapes": _shapes(values["shapes"])})

    def check(self, version: str, gpu: Gpu, rebuild: str) -> None:
        """Raise PlanError, naming what differs and with the command ``rebuild``, if it does not run here."""
        if version != self.version and not self.version_compatible:
            raise PlanError(f"the plan was built with TensorRT {self.version}, installed is {version}; {rebuild}")
        if not self._fits(gpu):
            raise PlanError(f"the plan was built for the {self.gpu}, but here is the {gpu}; {rebuild}")

    def _fits(self, gpu: Gpu) -> bool:
        if self.hardware == "ampere_plus":
            return gpu.capability >= AMPERE
        return gpu.capability == self.gpu.capability and (self.hardware != "none" or gpu.name == self.gpu.name)


def _gpu(values: Mapping[str, Any]) -> Gpu:
    major, minor = values["capability"]
    return Gpu(name=str(values["name"]), capability=(int(major), int(minor)))


def _shapes(values: Mapping[str, Any]) -> dict[str, list[list[list[int]]]]:
    return {
        part: [[[int(side) for side in shape] for shape in profile] for profile in profiles]
        for part, profiles in values.items()
    }

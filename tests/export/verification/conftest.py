"""A small detector in every form, and faults put into it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from fpn_engine.backends.native.packing import pack_part, unpack_part
from fpn_engine.plan import Plan, read_plan
from fpn_engine.work import Pixels
from fpn_export.build import build_plan
from fpn_export.verification import Subject, open_subject
from fpn_export.verification.opening import open_plan
from tests.engine.conftest import Tiny, make_picture, tiny
from tests.threads import one_thread

__all__ = ["one_thread", "tiny"]

Fault = Callable[[np.ndarray], np.ndarray]


@pytest.fixture(scope="session")
def native(tiny: Tiny) -> Plan:
    return build(tiny, "native", "fp32")


def build(tiny: Tiny, backend: str, precision: str) -> Plan:
    path = tiny.plan.with_name(f"{backend}-{precision}.plan")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FPN_ENGINE_CACHE", str(path.parent / "cache"))
        build_plan(tiny.model, path, backend=backend, precision=precision)
    return read_plan(path)


@pytest.fixture(scope="session")
def checkpoint(tiny: Tiny) -> Subject:
    return open_subject(tiny.checkpoint)


@pytest.fixture(scope="session")
def file(tiny: Tiny) -> Subject:
    return open_subject(tiny.model)


@pytest.fixture(scope="session")
def pictures() -> list[tuple[str, Pixels]]:
    return [(f"{number}.png", make_picture(*shape, seed=number)) for number, shape in enumerate([(60, 80), (90, 50)])]


def change_plan(plan: Plan, part: str, name: str, fault: Fault) -> Plan:
    """A copy of a native plan with one tensor changed."""
    program, weights = unpack_part(part, plan.parts)
    weights = {**weights, name: torch.from_numpy(np.ascontiguousarray(fault(weights[name].numpy().copy())))}
    return Plan(plan.manifest, {**plan.parts, **pack_part(part, program, weights)})


def change_file(tiny: Tiny, target: Path, name: str, fault: Fault) -> Path:
    """A copy of the ONNX file with one tensor changed."""
    model = onnx.load(str(tiny.model))
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(fault(numpy_helper.to_array(tensor).copy()), name))
    onnx.save(model, str(target))
    return target


def with_spec(subject: Any, **changes: Any) -> Any:
    """A copy of a subject with fields of its spec changed, none that its parts depend on."""
    changed = copy.copy(subject)
    changed.spec = dataclasses.replace(subject.spec, **changes)
    return changed


def open_native(plan: Plan, name: str = "native.plan") -> Subject:
    return open_plan(name, plan, threads=1)

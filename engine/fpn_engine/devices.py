"""Devices: where a plan runs."""

from __future__ import annotations

import dataclasses

import torch

from fpn_engine.errors import BackendError, PlanError
from fpn_engine.plan import Manifest, rebuild_hint


def choose_device(manifest: Manifest, name: str | None = None) -> torch.device:
    """The device for a plan, a CUDA device with its number.

    Args: name: "cpu", "cuda" or "cuda:1"; None and "cuda" take the current device of the plan's kind.
    Raises: BackendError for another name or a number that is not here, PlanError if the plan is for another kind of
        device, or for CUDA and there is none.
    """
    kind = "cuda" if manifest.device == "cuda" else "cpu"
    wanted = _parse(name or kind)
    plan = f"the plan is for {manifest.backend} {manifest.precision} on {manifest.device}"
    if wanted.type != kind:
        raise PlanError(f"{plan}, not on {name}; {_hint_for(wanted.type, manifest)}")
    if kind == "cpu":
        return wanted
    if not torch.cuda.is_available():
        hint = _hint_for("cpu", manifest)
        raise PlanError(f"{plan}, and PyTorch finds no CUDA device here, as fpn-engine doctor explains; {hint}")
    number = torch.cuda.current_device() if wanted.index is None else wanted.index
    if number >= torch.cuda.device_count():
        raise BackendError(f"there is no {wanted} here; the last CUDA device is cuda:{torch.cuda.device_count() - 1}")
    return torch.device("cuda", number)


def _hint_for(kind: str, manifest: Manifest) -> str:
    """The command that builds the model for another kind of device."""
    if kind == "cpu":
        return rebuild_hint(manifest, precision="fp32")
    if manifest.precision == "int8":  # as a quantised model is on TensorRT only
        return rebuild_hint(dataclasses.replace(manifest, backend="tensorrt"))
    return rebuild_hint(dataclasses.replace(manifest, backend="native", precision="fp16", device="cuda"))


def _parse(name: str) -> torch.device:
    kind, _, number = name.partition(":")
    if name in ("cpu", "cuda") or (kind == "cuda" and number.isascii() and number.isdigit()):
        return torch.device(name)
    raise BackendError(f"there is no device {name!r}; use cpu, cuda, or cuda:1 for the second of several")

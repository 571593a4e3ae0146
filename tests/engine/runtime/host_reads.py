"""A mode that refuses what a captured graph may not do: read values back, or make shapes of them."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
DEPENDENT = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
MASKS = (torch.bool, torch.uint8)


class HostReadError(AssertionError):
    """Something inside the captured region needs a value on the host."""


def check_op(func: Any, args: Any, kwargs: Any) -> None:
    """Raise HostReadError for an operator whose result's size or whose host side depends on values.

    Operators of ``fpn`` are one piece each: what their CUDA kernels do is tested on a GPU.
    """
    if func.namespace == "fpn":
        return
    if func in INDEXING:
        if any(t.dtype in MASKS for t in tree_leaves(args[1]) if isinstance(t, torch.Tensor)):
            raise HostReadError(f"{func} with a mask")
        return
    if DEPENDENT & set(func.tags):
        raise HostReadError(str(func))
    if func is aten.lift_fresh.default:
        raise HostReadError("torch.tensor() of host values")
    devices = {t.device for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.ndim}
    devices |= {torch.device(d) for d in [kwargs.get("device")] if d is not None and devices}
    if len({device.type for device in devices}) > 1:
        raise HostReadError(f"{func} between {devices}")


class NoHostReads(TorchDispatchMode):
    """Refuses such operators, those inside of compositions too. ``ops`` are the operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # a fake tensor is asked for its device
            return func(*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        check_op(func, args, kwargs)
        self.ops.append(func.name())
        return self.run(func, args, kwargs)

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)

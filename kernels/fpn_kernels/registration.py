"""Registration: one op, two implementations; CUDA tensors take the Triton kernel, CPU tensors the PyTorch reference."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Op:
    """A PyTorch operator ``fpn::name`` that torch.compile and CUDA graphs see as one piece.

    On the CPU outside of torch.compile the reference is called directly, so that autograd differentiates through it.

    Args:
        name: of the operator. schema: its arguments and results in PyTorch's notation; the first argument is a tensor
            or a list of them.
        reference: the PyTorch implementation. launcher: "module:function" of the Triton one, imported at its first use.
        fake: the results' shapes and dtypes from the arguments' alone.
        backward, save: as ``torch.library.register_autograd`` takes them, for ops that are trained through.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        reference: Callable[..., Any],
        launcher: str,
        fake: Callable[..., Any],
        *,
        backward: Callable[..., Any] | None = None,
        save: Callable[..., Any] | None = None,
    ) -> None:
        self._reference, self._launcher = reference, launcher
        self._op = torch.library.custom_op(
            f"fpn::{name}", self.launch, mutates_args=(), device_types="cuda", schema=schema
        )
        self._op.register_kernel("cpu")(reference)
        self._op.register_fake(fake)
        if backward is not None:
            self._op.register_autograd(backward, setup_context=save)

    def __call__(self, device: torch.device, *arguments: Any) -> Any:
        """Run on ``device``, where the tensors among ``arguments`` are."""
        if device.type == "cpu" and not torch.compiler.is_compiling():
            return self._reference(*arguments)
        return self._op(*arguments)

    def launch(self, *arguments: Any) -> Any:
        """Run the kernels. Triton launches on the current device, so that of the tensors becomes it meanwhile."""
        module, _, function = self._launcher.partition(":")
        first = arguments[0] if isinstance(arguments[0], Tensor) else arguments[0][0]
        with torch.cuda.device(first.device):
            return getattr(importlib.import_module(module), function)(*arguments)

    def dispatch(self, *arguments: Any) -> Any:
        """Run as one piece on any device, below autograd: for the backward of another op."""
        return self._op(*arguments)

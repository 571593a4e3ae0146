"""Batch norm folded into the convolution before it, for inference (Ioffe and Szegedy 2015, sec. 3.1)."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import TypeVar

import torch
from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def fold_batch_norm(model: ModuleT) -> ModuleT:
    """Return a copy in eval mode where each convolution followed by a batch norm is one convolution.

        scale = gamma / sqrt(running_var + eps)
        weight' = weight * scale;  bias' = beta + (bias - running_mean) * scale

    Computed in float64 and rounded once to the convolution's dtype. The batch norms become ``nn.Identity``.
    A pair is a ``Conv2d`` child and the ``BatchNorm2d`` child registered right after it.
    """
    folded = copy.deepcopy(model).eval()
    for parent in list(folded.modules()):
        for (conv_name, conv), (norm_name, norm) in pairwise(list(parent.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                _fold_into(conv, norm)
                parent.register_module(conv_name, conv)
                parent.register_module(norm_name, nn.Identity())
    return folded


@torch.no_grad()
def _fold_into(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    assert norm.running_mean is not None  # for mypy: this package always tracks statistics
    assert norm.running_var is not None
    dtype = conv.weight.dtype
    scale = norm.weight.double() * torch.rsqrt(norm.running_var.double() + norm.eps)
    before = torch.zeros_like(scale) if conv.bias is None else conv.bias.double()
    bias = norm.bias.double() + (before - norm.running_mean.double()) * scale
    conv.weight = nn.Parameter((conv.weight.double() * scale.reshape(-1, 1, 1, 1)).to(dtype))
    conv.bias = nn.Parameter(bias.to(dtype))

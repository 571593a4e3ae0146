"""The cases of ``bench_kernels``: each op at the shapes of R50-FPN on 800x1216, with its rivals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fpn_kernels
from benchmarks.kernel_case import (
    ANCHORS,
    CHANNELS,
    CLASSES,
    FILLED,
    LEVELS,
    ROI_LEVELS,
    SIZE,
    SLOTS,
    STAGES,
    TOLERANCE,
    TOP,
    KernelCase,
    largest_error,
)
from benchmarks.nms_cases import final_nms_case, plain_nms_case, rpn_nms_case
from benchmarks.pooling_cases import roi_align_case, roi_pool_case
from fpn_kernels.candidates import select_candidates_reference
from fpn_kernels.decode import decode_proposals_reference
from fpn_kernels.finiteness import find_nonfinite_reference
from fpn_kernels.selection import select_topk_reference
from tests.kernels.boxes import random_boxes, seeded


def all_cases(device: torch.device, batches: Sequence[int], dtype: torch.dtype) -> list[KernelCase]:
    """``dtype``: of the neural tensors."""
    cases = []
    for n in batches:
        cases += [
            preprocess_case(device, n, dtype),
            *merge_cases(device, n, dtype),
            select_case(device, n, dtype),
            decode_case(device, n, dtype),
            rpn_nms_case(device, n),
            roi_align_case(device, n, dtype),
            roi_pool_case(device, n, dtype),
            candidates_case(device, n, dtype),
            final_nms_case(device, n),
            finiteness_case(device, n, dtype),
        ]
    return cases + [plain_nms_case(device, k) for k in (1_000, 10_000, 20_000, 100_000)]


def preprocess_case(device: torch.device, n: int, dtype: torch.dtype) -> KernelCase:
    height, width = 480, 730
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    image_sizes = torch.tensor([SIZE] * n, device=device)
    m, s = (torch.tensor(v, device=device)[:, None, None] for v in (mean, std))

    def inputs(number: int) -> tuple[Any, ...]:
        pixels = torch.randint(256, (n, height, width, 3), dtype=torch.uint8, generator=seeded(number))
        return tuple(t.to(device) for t in fpn_kernels.pack_images(list(pixels)))

    def ours(pixels: Tensor, offsets: Tensor, sizes: Tensor) -> Tensor:
        return fpn_kernels.preprocess(pixels, offsets, sizes, image_sizes, SIZE, mean, std, dtype=dtype)

    def eager(pixels: Tensor, offsets: Tensor, sizes: Tensor) -> Tensor:
        images = pixels.view(n, height, width, 3).permute(0, 3, 1, 2).float() / 255
        return F.interpolate((images - m) / s, size=SIZE, mode="bilinear", align_corners=False).to(dtype)

    return KernelCase(
        name="preprocess",
        batch=n,
        dtype=dtype,
        make_inputs=inputs,
        contestants={"fpn_kernels": ours, "eager": eager},
        compare=largest_error,
        tolerance=TOLERANCE[dtype],
        moved=n * 3 * (height * width + SIZE[0] * SIZE[1] * dtype.itemsize),
        launches=1,
    )


def merge_cases(device: torch.device, n: int, dtype: torch.dtype) -> list[KernelCase]:
    """The pure merge of P2, and laterals with merge of all levels."""

    def maps(number: int, channels: Sequence[int]) -> list[Tensor]:
        return [
            torch.randn(n, c, h, w, generator=seeded(number)).to(device, dtype, memory_format=torch.channels_last)
            for c, (h, w) in zip(channels, ROI_LEVELS, strict=True)
        ]

    def eager(lateral: Tensor, coarser: Tensor) -> Tensor:
        return lateral + F.interpolate(coarser, size=lateral.shape[-2:], mode="nearest")

    weights = [torch.randn(CHANNELS, c, 1, 1, generator=seeded(c)).to(device, dtype) / c**0.5 for c in STAGES]
    biases = [torch.randn(CHANNELS, generator=seeded(c)).to(device, dtype) for c in STAGES]

    def all_ours(*stages: Tensor) -> list[Tensor]:
        merged: list[Tensor] = []
        for c, w, b in reversed(list(zip(stages, weights, biases, strict=True))):
            merged.append(fpn_kernels.lateral_merge(c, w, b, merged[-1] if merged else None))
        return merged

    def all_eager(*stages: Tensor) -> list[Tensor]:
        merged: list[Tensor] = []
        for c, w, b in reversed(list(zip(stages, weights, biases, strict=True))):
            lateral = F.conv2d(c, w, b)
            merged.append(eager(lateral, merged[-1]) if merged else lateral)
        return merged

    cells = [h * w for h, w in ROI_LEVELS]
    pure = CHANNELS * (2 * cells[0] + cells[1])
    fused = sum(a * (c + CHANNELS) for a, c in zip(cells, STAGES, strict=True)) + CHANNELS * sum(cells[1:])
    return [
        KernelCase(
            name="merge P2",
            batch=n,
            dtype=dtype,
            make_inputs=lambda number: tuple(maps(number, [CHANNELS] * 4)[:2]),
            contestants={"fpn_kernels": fpn_kernels.topdown_merge, "eager": eager},
            compare=largest_error,
            tolerance=TOLERANCE[dtype],
            moved=n * pure * dtype.itemsize,
            launches=1,
        ),
        KernelCase(
            name="lateral + upsample + add, all levels",
            batch=n,
            dtype=dtype,
            make_inputs=lambda number: tuple(maps(number, STAGES)),
            contestants={"fpn_kernels": all_ours, "eager": all_eager},
            compare=largest_error,
            tolerance=TOLERANCE[dtype],
            moved=(n * fused + sum(w.numel() for w in weights)) * dtype.itemsize,
            flops=2 * n * CHANNELS * sum(a * c for a, c in zip(cells, STAGES, strict=True)),
            launches=len(STAGES),
        ),
    ]


def select_case(device: torch.device, n: int, dtype: torch.dtype) -> KernelCase:
    def inputs(number: int) -> tuple[Any, ...]:
        levels = [torch.randn(n, ANCHORS, h, w, generator=seeded(number)).to(device, dtype) for h, w in LEVELS]
        return ([level.to(memory_format=torch.channels_last) for level in levels],)

    def select(levels: list[Tensor]) -> tuple[Tensor, ...]:
        return select_topk_reference([level.cpu() for level in levels], TOP)

    def eager(levels: list[Tensor]) -> tuple[Tensor, ...]:
        best = [level.permute(0, 2, 3, 1).flatten(1) for level in levels]
        return (torch.cat([flat.float().topk(min(TOP, flat.shape[1])).values for flat in best], dim=1),)

    return KernelCase(
        name="select",
        batch=n,
        dtype=dtype,
        make_inputs=inputs,
        contestants={"fpn_kernels": lambda levels: fpn_kernels.select_topk(levels, TOP), "torch.topk": eager},
        compare=lambda ours, theirs: largest_error(ours[:1], theirs),
        tolerance=TOLERANCE[dtype],
        expected=select,
        moved=n * (sum(ANCHORS * h * w for h, w in LEVELS) * dtype.itemsize + sum(SLOTS) * 12),
        launches=5,
    )


def decode_case(device: torch.device, n: int, dtype: torch.dtype) -> KernelCase:
    anchors = torch.stack([fpn_kernels.make_base_anchors((32 << i,), (0.5, 1.0, 2.0)) for i in range(5)]).to(device)
    given = (anchors, SIZE, torch.tensor([SIZE] * n, device=device))

    def inputs(number: int) -> tuple[Any, ...]:
        logits = torch.randn(n, sum(SLOTS), generator=seeded(number))
        cells = [
            torch.randint(ANCHORS * h * w, (n, k), generator=seeded(number))
            for (h, w), k in zip(LEVELS, SLOTS, strict=True)
        ]
        deltas = [torch.randn(n, 4 * ANCHORS, h, w, generator=seeded(number)) / 4 for h, w in LEVELS]
        on_device = [level.to(device, dtype, memory_format=torch.channels_last) for level in deltas]
        return logits.to(device), torch.cat(cells, dim=1).to(device), on_device

    def ours(logits: Tensor, indices: Tensor, deltas: list[Tensor]) -> tuple[Tensor, ...]:
        return fpn_kernels.decode_proposals(logits, indices, deltas, *given, k=TOP)[:1]

    def eager(logits: Tensor, indices: Tensor, deltas: list[Tensor]) -> tuple[Tensor, ...]:
        return decode_proposals_reference(logits, indices, deltas, *given, TOP, 1e-3, 0.0)[:1]

    return KernelCase(
        name="anchors, decode, clip",
        batch=n,
        dtype=dtype,
        make_inputs=inputs,
        contestants={"fpn_kernels": ours, "eager": eager},
        compare=largest_error,
        tolerance=TOLERANCE[torch.float32],
        moved=n * sum(SLOTS) * (12 + 4 * dtype.itemsize + 20),
        launches=1,
    )


def candidates_case(device: torch.device, n: int, dtype: torch.dtype) -> KernelCase:
    counts, image_sizes = torch.full((n,), TOP, device=device), torch.tensor([SIZE] * n, device=device)
    capacity = fpn_kernels.candidate_capacity(TOP, CLASSES + 1, 0.05)

    def inputs(number: int) -> tuple[Any, ...]:
        logits = torch.randn(n * TOP, CLASSES + 1, generator=seeded(number)) * 2
        logits[:, 0] += 4
        deltas = torch.randn(n * TOP, 4 * (CLASSES + 1), generator=seeded(number)) * 0.5
        proposals = torch.stack([random_boxes(TOP, seed=100 * number + i) for i in range(n)])
        return logits.to(device, dtype), deltas.to(device, dtype), proposals.to(device)

    def ours(logits: Tensor, deltas: Tensor, proposals: Tensor) -> Tensor:
        return fpn_kernels.select_candidates(logits, deltas, proposals, counts, image_sizes)[0]

    def eager(logits: Tensor, deltas: Tensor, proposals: Tensor) -> Tensor:
        weights = (10.0, 10.0, 5.0, 5.0)
        return select_candidates_reference(
            logits, deltas, proposals, counts, image_sizes, 0.05, 1e-2, weights, capacity
        )[0]

    return KernelCase(
        name="softmax, threshold, decode, compact",
        batch=n,
        dtype=dtype,
        make_inputs=inputs,
        contestants={"fpn_kernels": ours, "eager": eager},
        compare=largest_error,
        tolerance=TOLERANCE[torch.float32],
        moved=n * (TOP * ((CLASSES + 1) * dtype.itemsize + 16) + FILLED * 4 * dtype.itemsize + capacity * 28),
        launches=2,
    )


def finiteness_case(device: torch.device, n: int, dtype: torch.dtype) -> KernelCase:
    """Features, and objectness and deltas as the slices of a merged head in float32."""
    merged = 5 * ANCHORS

    def inputs(number: int) -> tuple[Any, ...]:
        features = [torch.randn(n, CHANNELS, h, w, generator=seeded(number)) for h, w in ROI_LEVELS]
        heads = [torch.randn(n, merged, h, w, generator=seeded(number)) for h, w in LEVELS]
        maps = [level.to(device, dtype, memory_format=torch.channels_last) for level in features]
        heads = [level.to(device, memory_format=torch.channels_last) for level in heads]
        return ([*maps, *(level[:, :ANCHORS] for level in heads), *(level[:, ANCHORS:] for level in heads)],)

    def eager(tensors: list[Tensor]) -> Tensor:
        sums = [tensor.sum(dim=(1, 2, 3), dtype=torch.float32) for tensor in tensors]
        return (~torch.stack(sums).isfinite().all(dim=0)).to(torch.int64)

    def expected(tensors: list[Tensor]) -> tuple[Tensor]:
        return (find_nonfinite_reference(tensors, None).cpu(),)

    cells = [sum(h * w for h, w in levels) for levels in (ROI_LEVELS, LEVELS)]
    return KernelCase(
        name="look for NaN and infinity",
        batch=n,
        dtype=dtype,
        make_inputs=inputs,
        contestants={"fpn_kernels": lambda tensors: (fpn_kernels.find_nonfinite(tensors),), "eager": eager},
        compare=lambda ours, theirs: largest_error(ours[0], theirs),
        tolerance=0.0,
        expected=expected,
        moved=n * (cells[0] * CHANNELS * dtype.itemsize + cells[1] * merged * 4 + 8),
        launches=2 if n == 1 else 3,
    )

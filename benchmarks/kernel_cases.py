"""The cases of ``bench_kernels``: each op at the shapes of R50-FPN on 800x1216, its rivals, the bytes it must move."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

import fpn_kernels
from tests.kernels.boxes import clustered_boxes, random_boxes, seeded

SIZE, LEVELS = (800, 1216), ((200, 304), (100, 152), (50, 76), (25, 38), (13, 19))
ROI_LEVELS, STRIDES = LEVELS[:4], (4.0, 8.0, 16.0, 32.0)
ANCHORS, TOP, CLASSES, CHANNELS = 3, 1000, 90, 256
STAGES = (256, 512, 1024, 2048)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One op at one shape.

    Attributes:
        make_inputs: arguments of a round from its number. contestants: "fpn_kernels" and its rivals by name.
        compare: largest error of ours against a rival's result, or a raise. moved: bytes read and written once.
        flops: multiply-adds times two. targets: microseconds for batch 1 on an H200, where there is one.
    """

    name: str
    batch: int
    dtype: torch.dtype
    make_inputs: Callable[[int], tuple[Any, ...]]
    contestants: Mapping[str, Callable[..., Any]]
    compare: Callable[[Any, Any], float]
    moved: int
    flops: int = 0
    targets: Mapping[str, float] = field(default_factory=dict)


def all_cases(device: torch.device, batches: Sequence[int]) -> list[Case]:
    """On a GPU neural tensors are float16, on a CPU float32."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    cases = []
    for n in batches:
        cases += [
            preprocess_case(device, n, dtype),
            *merge_cases(device, n, dtype),
            select_case(device, n, dtype),
            rpn_nms_case(device, n),
            roi_align_case(device, n, dtype),
            candidates_case(device, n, dtype),
            final_nms_case(device, n),
        ]
    return cases + [plain_nms_case(device, k) for k in (1_000, 10_000, 20_000, 100_000)]


def largest_error(ours: Any, theirs: Any) -> float:
    """Of tensors or sequences of them, relative to the largest magnitude."""
    if isinstance(ours, Tensor):
        scale = theirs.float().abs().max().clamp(min=1e-6)
        return ((ours.float() - theirs.float()).abs().max() / scale).item()
    return max(largest_error(a, b) for a, b in zip(ours, theirs, strict=True))


def same(ours: Any, theirs: Any) -> float:
    """0, or an AssertionError: indices and counts are equal or wrong."""
    pairs = [(ours, theirs)] if isinstance(ours, Tensor) else zip(ours, theirs, strict=True)
    for a, b in pairs:
        assert torch.equal(a.cpu(), b.cpu()), "results differ"
    return 0.0


def preprocess_case(device: torch.device, n: int, dtype: torch.dtype) -> Case:
    height, width = 480, 730
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    image_sizes = torch.tensor([SIZE] * n, device=device)

    def inputs(number: int) -> tuple[Any, ...]:
        pixels = torch.randint(256, (n, height, width, 3), dtype=torch.uint8, generator=seeded(number))
        return tuple(t.to(device) for t in fpn_kernels.pack_images(list(pixels)))

    def ours(pixels: Tensor, offsets: Tensor, sizes: Tensor) -> Tensor:
        return fpn_kernels.preprocess(pixels, offsets, sizes, image_sizes, SIZE, mean, std, dtype=dtype)

    def eager(pixels: Tensor, offsets: Tensor, sizes: Tensor) -> Tensor:
        images = pixels.view(n, height, width, 3).permute(0, 3, 1, 2).float() / 255
        m, s = (torch.tensor(v, device=device)[:, None, None] for v in (mean, std))
        return F.interpolate((images - m) / s, size=SIZE, mode="bilinear", align_corners=False).to(dtype)

    return Case(
        name="preprocess",
        batch=n,
        dtype=dtype,
        make_inputs=inputs,
        contestants={"fpn_kernels": ours, "eager": eager},
        compare=largest_error,
        moved=n * 3 * (height * width + SIZE[0] * SIZE[1] * dtype.itemsize),
    )


def merge_cases(device: torch.device, n: int, dtype: torch.dtype) -> list[Case]:
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
        Case(
            name="merge P2",
            batch=n,
            dtype=dtype,
            make_inputs=lambda number: tuple(maps(number, [CHANNELS] * 4)[:2]),
            contestants={"fpn_kernels": fpn_kernels.topdown_merge, "eager": eager},
            compare=largest_error,
            moved=n * pure * dtype.itemsize,
        ),
        Case(
            name="lateral + upsample + add, all levels",
            batch=n,
            dtype=dtype,
            make_inputs=lambda number: tuple(maps(number, STAGES)),
            contestants={"fpn_kernels": all_ours, "eager": all_eager},
            compare=largest_error,
            moved=(n * fused + sum(w.numel() for w in weights)) * dtype.itemsize,
            flops=2 * n * CHANNELS * sum(a * c for a, c in zip(cells, STAGES, strict=True)),
            targets={"good": 45, "extreme": 35} if n == 1 else {},
        ),
    ]


def select_case(device: torch.device, n: int, dtype: torch.dtype) -> Case:
    def inputs(number: int) -> tuple[Any, ...]:
        levels = [torch.randn(n, ANCHORS, h, w, generator=seeded(number)).to(device, dtype) for h, w in LEVELS]
        return ([level.to(memory_format=torch.channels_last) for level in levels],)

    def eager(levels: list[Tensor]) -> tuple[Tensor, ...]:
        best = [level.permute(0, 2, 3, 1).flatten(1) for level in levels]
        return (torch.cat([flat.float().topk(min(TOP, flat.shape[1])).values for flat in best], dim=1),)

    return Case(
        name="select",
        batch=n,
        dtype=dtype,
        make_inputs=inputs,
        contestants={"fpn_kernels": lambda levels: fpn_kernels.select_topk(levels, TOP)[:1], "torch.topk": eager},
        compare=largest_error,
        moved=n * sum(ANCHORS * h * w for h, w in LEVELS) * dtype.itemsize,
    )


def nms_case(
    device: torch.device,
    name: str,
    make: Callable[[int], tuple[Tensor, Tensor, Tensor]],
    n: int,
    threshold: float,
    limit: int,
    targets: Mapping[str, float],
) -> Case:
    """``make``: boxes (N, K, 4), scores (N, K) and groups (N, K) of a round."""

    def inputs(number: int) -> tuple[Any, ...]:
        return tuple(t.to(device) for t in make(number))

    def ours(boxes: Tensor, scores: Tensor, groups: Tensor) -> list[Tensor]:
        return list(fpn_kernels.padded_nms(boxes, scores, groups, threshold, limit))

    def theirs(boxes: Tensor, scores: Tensor, groups: Tensor) -> list[Tensor]:
        keep = torch.full((n, limit), -1, device=device)
        counts = torch.zeros(n, dtype=torch.int64, device=device)
        for image in range(n):
            present = (scores[image] > -torch.inf).nonzero()[:, 0]
            arguments = (boxes[image, present], scores[image, present], groups[image, present], threshold)
            kept = present[torchvision.ops.boxes._batched_nms_vanilla(*arguments)][:limit]
            keep[image, : len(kept)] = kept
            counts[image] = len(kept)
        return [keep, counts]

    def offsets(boxes: Tensor, scores: Tensor, groups: Tensor) -> list[Tensor]:
        """What torchvision's detectors call; offsets round, so its result is not compared."""
        return [
            torchvision.ops.batched_nms(b[s > -torch.inf], s[s > -torch.inf], g[s > -torch.inf], threshold)[:limit]
            for b, s, g in zip(boxes, scores, groups, strict=True)
        ]

    example = make(0)
    return Case(
        name=name,
        batch=n,
        dtype=torch.float32,
        make_inputs=inputs,
        contestants={"fpn_kernels": ours, "torchvision, per class": theirs, "torchvision.ops.batched_nms": offsets},
        compare=lambda a, b: same(a, b) if len(b) == 2 and b[0].shape == a[0].shape else 0.0,
        moved=sum(t.numel() * t.element_size() for t in example),
        targets=targets,
    )


def rpn_nms_case(device: torch.device, n: int) -> Case:
    slots = [min(TOP, ANCHORS * h * w) for h, w in LEVELS]
    groups = torch.cat([torch.full((count,), level) for level, count in enumerate(slots)])

    def make(number: int) -> tuple[Tensor, Tensor, Tensor]:
        boxes = torch.stack([clustered_boxes(sum(slots), 300, seed=1000 * number + i) for i in range(n)])
        return boxes, torch.rand(n, sum(slots), generator=seeded(number)), groups.expand(n, -1).contiguous()

    targets = {"first": 150, "good": 50, "extreme": 15} if n == 1 else {}
    return nms_case(device, f"RPN NMS, {sum(slots)} boxes in 5 levels", make, n, 0.7, TOP, targets)


def final_nms_case(device: torch.device, n: int) -> Case:
    """1000 proposals by 90 classes: 19 slots a proposal, a tenth of them filled."""
    capacity = fpn_kernels.candidate_capacity(TOP, CLASSES + 1, 0.05)
    filled = 2000

    def make(number: int) -> tuple[Tensor, Tensor, Tensor]:
        boxes = torch.zeros(n, capacity, 4)
        scores = torch.full((n, capacity), -torch.inf)
        labels = torch.ones(n, capacity, dtype=torch.int64)
        boxes[:, :filled] = torch.stack([clustered_boxes(filled, 60, seed=1000 * number + i) for i in range(n)])
        scores[:, :filled] = 0.05 + 0.95 * torch.rand(n, filled, generator=seeded(number))
        labels[:, :filled] = torch.randint(1, CLASSES + 1, (n, filled), generator=seeded(number))
        return boxes, scores, labels

    targets = {"first": 150, "good": 60, "extreme": 25} if n == 1 else {}
    return nms_case(device, f"final NMS, {filled} of {capacity} slots", make, n, 0.5, 100, targets)


def plain_nms_case(device: torch.device, k: int) -> Case:
    def make(number: int) -> tuple[Tensor, Tensor, Tensor]:
        labels = torch.randint(80, (1, k), generator=seeded(number))
        boxes = torch.cat([clustered_boxes(k // 2, 200, seed=number), random_boxes(k - k // 2, seed=number)])
        return boxes[None], torch.rand(1, k, generator=seeded(number)), labels

    return nms_case(device, f"NMS, {k} boxes in 80 classes", make, 1, 0.5, k, {})


def roi_align_case(device: torch.device, n: int, dtype: torch.dtype) -> Case:
    def inputs(number: int) -> tuple[Any, ...]:
        features = [
            torch.randn(n, CHANNELS, h, w, generator=seeded(number)).to(
                device, dtype, memory_format=torch.channels_last
            )
            for h, w in ROI_LEVELS
        ]
        rois = torch.cat([torch.arange(n).repeat_interleave(TOP)[:, None], random_boxes(n * TOP, seed=number)], dim=1)
        return features, rois.to(device)

    def theirs(features: list[Tensor], rois: Tensor) -> Tensor:
        levels = fpn_kernels.assign_levels(rois[:, 1:], 2, 5)
        out = features[0].new_zeros(len(rois), CHANNELS, 7, 7)
        for level, (feature, stride) in enumerate(zip(features, STRIDES, strict=True), start=2):
            chosen = (levels == level).nonzero()[:, 0]
            pooled = torchvision.ops.roi_align(feature, rois[chosen].to(dtype), 7, 1 / stride, 2, False)
            out[chosen] = pooled
        return out

    return Case(
        name="multi-level RoIAlign, 1000 RoIs an image",
        batch=n,
        dtype=dtype,
        make_inputs=inputs,
        contestants={
            "fpn_kernels": lambda features, rois: fpn_kernels.multilevel_roi_align(features, rois),
            "torchvision.ops.roi_align": theirs,
        },
        compare=largest_error,
        moved=n * CHANNELS * (sum(h * w for h, w in ROI_LEVELS) + TOP * 49) * dtype.itemsize,
        targets={"first": 200, "good": 120, "extreme": 90} if n == 1 else {},
    )


def candidates_case(device: torch.device, n: int, dtype: torch.dtype) -> Case:
    counts, image_sizes = torch.full((n,), TOP, device=device), torch.tensor([SIZE] * n, device=device)

    def inputs(number: int) -> tuple[Any, ...]:
        logits = torch.randn(n * TOP, CLASSES + 1, generator=seeded(number)) * 2
        logits[:, 0] += 4
        deltas = torch.randn(n * TOP, 4 * (CLASSES + 1), generator=seeded(number)) * 0.5
        proposals = torch.stack([random_boxes(TOP, seed=100 * number + i) for i in range(n)])
        return logits.to(device, dtype), deltas.to(device, dtype), proposals.to(device)

    def ours(logits: Tensor, deltas: Tensor, proposals: Tensor) -> Tensor:
        return fpn_kernels.select_candidates(logits, deltas, proposals, counts, image_sizes)[0]

    def eager(logits: Tensor, deltas: Tensor, proposals: Tensor) -> Tensor:
        found = fpn_kernels.candidates.select_candidates_reference(
            logits, deltas, proposals, counts, image_sizes, 0.05, 1e-2, (10.0, 10.0, 5.0, 5.0), 19 * TOP
        )
        return found[0]

    return Case(
        name="softmax, threshold, decode, compact",
        batch=n,
        dtype=dtype,
        make_inputs=inputs,
        contestants={"fpn_kernels": ours, "eager": eager},
        compare=largest_error,
        moved=n * TOP * (CLASSES + 1) * dtype.itemsize,
    )

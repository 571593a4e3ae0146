"""Every public function that goes through an operator, with arguments to try it on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fpn_kernels
from tests.kernels.boxes import clustered_boxes, make_pyramid, make_rois, seeded
from tests.kernels.test_candidates import make_head
from tests.kernels.test_decode import BASE_ANCHORS, make_outputs
from tests.kernels.test_preprocess import MEAN, STD, make_image

K = 20


def preprocess(pixels: Tensor, offsets: Tensor, sizes: Tensor, image_sizes: Tensor, padded_size: Any) -> Tensor:
    return fpn_kernels.preprocess(pixels, offsets, sizes, image_sizes, padded_size, MEAN, STD, dtype=torch.float16)


def select_topk(*objectness: Tensor) -> tuple[Tensor, ...]:
    return fpn_kernels.select_topk(objectness, K)


def decode_proposals(
    logits: Tensor, indices: Tensor, base_anchors: Tensor, padded_size: Any, image_sizes: Tensor, *deltas: Tensor
) -> tuple[Tensor, ...]:
    return fpn_kernels.decode_proposals(logits, indices, deltas, base_anchors, padded_size, image_sizes, k=K)


def padded_nms(boxes: Tensor, scores: Tensor, groups: Tensor) -> tuple[Tensor, ...]:
    return fpn_kernels.padded_nms(boxes, scores, groups, 0.5, 10, boxes.shape[1])


def batched_nms(boxes: Tensor, scores: Tensor, groups: Tensor) -> Tensor:
    return fpn_kernels.batched_nms(boxes, scores, groups, 0.5)


def nms(boxes: Tensor, scores: Tensor) -> Tensor:
    return fpn_kernels.nms(boxes, scores, 0.5)


def multilevel_roi_align(rois: Tensor, counts: Tensor, *features: Tensor) -> Tensor:
    return fpn_kernels.multilevel_roi_align(features, rois, counts, output_size=2, canonical_size=60)


def adaptive_roi_align(rois: Tensor, *features: Tensor) -> Tensor:
    return fpn_kernels.multilevel_roi_align(features, rois, output_size=2, sampling_ratio=0, aligned=True)


def roi_align(features: Tensor, rois: Tensor) -> Tensor:
    return fpn_kernels.roi_align(features, rois, 2, 0.25, 2)


def multilevel_roi_pool(rois: Tensor, counts: Tensor, *features: Tensor) -> Tensor:
    return fpn_kernels.multilevel_roi_pool(features, rois, counts, output_size=2, canonical_size=60)


def roi_pool(features: Tensor, rois: Tensor) -> Tensor:
    return fpn_kernels.roi_pool(features, rois, 2, 0.25)


def gather_windows(places: Tensor, *features: Tensor) -> Tensor:
    return fpn_kernels.gather_windows(features, places, 3)


def window_linear(places: Tensor, weight: Tensor, bias: Tensor, *features: Tensor) -> Tensor:
    return fpn_kernels.window_linear(features, places, weight, bias, kernel=3, relu=True)


def find_nonfinite(known: Tensor, *tensors: Tensor) -> Tensor:
    return fpn_kernels.find_nonfinite(tensors, known)


FUNCTIONS = {
    "preprocess": preprocess,
    "topdown_merge": fpn_kernels.topdown_merge,
    "lateral_merge": fpn_kernels.lateral_merge,
    "select_topk": select_topk,
    "decode_proposals": decode_proposals,
    "padded_nms": padded_nms,
    "batched_nms": batched_nms,
    "nms": nms,
    "multilevel_roi_align": multilevel_roi_align,
    "adaptive_roi_align": adaptive_roi_align,
    "roi_align": roi_align,
    "multilevel_roi_pool": multilevel_roi_pool,
    "roi_pool": roi_pool,
    "select_candidates": fpn_kernels.select_candidates,
    "gather_windows": gather_windows,
    "window_linear": window_linear,
    "take_proposals": fpn_kernels.take_proposals,
    "take_detections": fpn_kernels.take_detections,
    "find_nonfinite": find_nonfinite,
}


def make_arguments(height: int = 26, width: int = 38, n: int = 2) -> dict[str, tuple[Any, ...]]:
    """Arguments of each function, for ``n`` images whose finest level has ``height`` by ``width`` cells."""
    shapes = [(height, width)]
    for _ in range(4):
        shapes.append(((shapes[-1][0] + 1) // 2, (shapes[-1][1] + 1) // 2))
    padded_size = 4 * height, 4 * width
    image_sizes = torch.tensor([[3 * height, 4 * width]] * n)
    packed = fpn_kernels.pack_images([make_image(height, width + i) for i in range(n)])
    objectness, deltas = make_outputs(n, shapes)
    logits, indices, _ = fpn_kernels.select_topk(objectness, K)
    boxes = torch.stack([clustered_boxes(height, 5, seed=i) for i in range(n)])
    scores = torch.randint(7, (n, height), generator=seeded()) / 7
    groups = torch.randint(3, (n, height), generator=seeded())
    features, rois = make_pyramid(n=n, c=5, levels=shapes[:4]), make_rois(5, n=n, size=padded_size, largest=200)
    counts = torch.arange(n) + 3
    c, weight, bias = (torch.randn(shape, generator=seeded()) for shape in ((n, 6, height, width), (5, 6), (5,)))
    places = torch.stack([torch.arange(2 * n) % size for size in (n, len(features), 4, 5)], dim=1)
    keep = torch.arange(7).expand(n, 7) - 1
    return {
        "preprocess": (*packed, image_sizes, padded_size),
        "topdown_merge": (features[0], features[1]),
        "lateral_merge": (c, weight, bias, features[1]),
        "select_topk": tuple(objectness),
        "decode_proposals": (logits, indices, BASE_ANCHORS, padded_size, image_sizes, *deltas),
        "padded_nms": (boxes, scores, groups),
        "batched_nms": (boxes[0], scores[0], groups[0]),
        "nms": (boxes[0], scores[0]),
        "multilevel_roi_align": (rois, counts, *features),
        "adaptive_roi_align": (rois, *features),
        "roi_align": (features[0], rois),
        "multilevel_roi_pool": (rois, counts, *features),
        "roi_pool": (features[0], rois),
        "select_candidates": (*make_head(n, height, 4), counts, image_sizes),
        "gather_windows": (places, *features),
        "window_linear": (places, torch.randn(6, 45, generator=seeded()), weight[0], *features),
        "take_proposals": (keep, boxes, scores),
        "take_detections": (keep, boxes, scores, groups),
        "find_nonfinite": (groups[:, 0], *features, *objectness),
    }

"""The ops between image and boxes of an FPN detector: Triton kernels on CUDA, PyTorch references elsewhere.

Boxes are (x1, y1, x2, y2) in pixels, float32, half-open. Everything is batched at fixed capacity with counts
beside it; a score of -inf marks an empty slot.
"""

from fpn_kernels.candidates import candidate_capacity, select_candidates
from fpn_kernels.decode import clip_boxes, decode_boxes, decode_proposals, make_base_anchors
from fpn_kernels.finiteness import find_nonfinite
from fpn_kernels.kept import take_detections, take_proposals
from fpn_kernels.levels import assign_levels
from fpn_kernels.nms import batched_nms, nms, padded_nms
from fpn_kernels.preprocess import PackedImages, pack_images, preprocess
from fpn_kernels.roi_align import multilevel_roi_align, roi_align
from fpn_kernels.roi_pool import multilevel_roi_pool, roi_pool
from fpn_kernels.selection import select_topk, stable_topk
from fpn_kernels.topdown import lateral_merge, topdown_merge
from fpn_kernels.windows import gather_windows, window_linear

__all__ = [
    "PackedImages",
    "assign_levels",
    "batched_nms",
    "candidate_capacity",
    "clip_boxes",
    "decode_boxes",
    "decode_proposals",
    "find_nonfinite",
    "gather_windows",
    "lateral_merge",
    "make_base_anchors",
    "multilevel_roi_align",
    "multilevel_roi_pool",
    "nms",
    "pack_images",
    "padded_nms",
    "preprocess",
    "roi_align",
    "roi_pool",
    "select_candidates",
    "select_topk",
    "stable_topk",
    "take_detections",
    "take_proposals",
    "topdown_merge",
    "window_linear",
]

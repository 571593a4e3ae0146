"""Box arithmetic inside kernels, rounded as the references round: no fused multiply-adds, IEEE division.

Kernels that use it are launched with ``enable_fp_fusion=False``. NaN goes through every comparison below unchanged.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def is_finite(x):
    """Neither NaN nor infinite."""
    return (x == x) & (tl.abs(x) != float("inf"))


@triton.jit
def is_present(boxes, scores, at, inside):
    """Which boxes take part in NMS: score neither NaN nor -inf, corners finite."""
    score = tl.load(scores + at, mask=inside, other=float("-inf"))
    present = inside & (score == score) & (score != float("-inf"))
    for side in tl.static_range(4):
        present &= is_finite(tl.load(boxes + at * 4 + side, mask=inside, other=float("nan")))
    return present


@triton.jit
def exponential(x):
    """exp(x) in float32 within 1 ulp, of sums and products that round alike on every device.

    The reduction and the polynomial of Cephes' expf (Moshier 1989), and 2^n in two factors, so that neither overflows
    and results below the smallest normal number round correctly. ``tl.exp`` is off by up to |x| / 2 ulp.
    """
    limited = tl.where(x > 89.0, 89.0, x)
    limited = tl.where(limited > -105.0, limited, -105.0)  # NaN too, for the sake of the integer
    n = tl.floor(limited * 1.44269504088896341 + 0.5)
    r = limited - n * 0.693359375  # ln 2 in two parts; this product is exact
    r = r - n * -2.12194440e-4
    y = 1.9875691500e-4
    y = y * r + 1.3981999507e-3
    y = y * r + 8.3334519073e-3
    y = y * r + 4.1665795894e-2
    y = y * r + 1.6666665459e-1
    y = y * r + 5.0000001201e-1
    y = y * (r * r) + r + 1.0
    whole = n.to(tl.int32)
    half = whole >> 1
    y = y * ((half + 127) << 23).to(tl.float32, bitcast=True)
    y = y * ((whole - half + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(x == x, y, x)


@triton.jit
def decode_box(x1, y1, x2, y2, dx, dy, dw, dh, LOG_SIZE_LIMIT: tl.constexpr):
    """:func:`fpn_kernels.decode_boxes` of deltas that their weights have already divided."""
    w = x2 - x1
    h = y2 - y1
    cx = dx * w + (x1 + 0.5 * w)
    cy = dy * h + (y1 + 0.5 * h)
    half_w = 0.5 * (exponential(tl.where(dw > LOG_SIZE_LIMIT, LOG_SIZE_LIMIT, dw)) * w)
    half_h = 0.5 * (exponential(tl.where(dh > LOG_SIZE_LIMIT, LOG_SIZE_LIMIT, dh)) * h)
    return cx - half_w, cy - half_h, cx + half_w, cy + half_h


@triton.jit
def _clip(x, limit):
    x = tl.where(x < 0.0, 0.0, x)
    return tl.where(x > limit, limit, x)


@triton.jit
def clip_box(x1, y1, x2, y2, image_sizes, image):
    """:func:`fpn_kernels.clip_boxes`; ``image_sizes``: (N, 2) int64, height and width."""
    h = tl.load(image_sizes + 2 * image).to(tl.float32)
    w = tl.load(image_sizes + 2 * image + 1).to(tl.float32)
    return _clip(x1, w), _clip(y1, h), _clip(x2, w), _clip(y2, h)


@triton.jit
def store_box(boxes, at, x1, y1, x2, y2, mask):
    """Row ``at`` of (K, 4) boxes."""
    tl.store(boxes + 4 * at, x1, mask=mask)
    tl.store(boxes + 4 * at + 1, y1, mask=mask)
    tl.store(boxes + 4 * at + 2, x2, mask=mask)
    tl.store(boxes + 4 * at + 3, y2, mask=mask)

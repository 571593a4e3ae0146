"""A look at every number's exponent: whole words of dense tensors in one launch, single numbers of all else.

A number is NaN or infinite if all bits of its exponent are set; no arithmetic is done. Images of which something is
found get a 1, the same from whoever finds it, so that no order of programs shows.

Reading is all there is to do. A dense tensor is read 16 bytes at a time, whatever its number type, as words of one
number or two; so one launch takes all types together. One program per multiprocessor goes over it, not one per block:
four were as fast as the memory, and the short kernels beside them a half slower.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpn_kernels.triton.builds import Build
from fpn_kernels.triton.levels import count_blocks, find_level, pack_sizes, pick_pointer, pick_size

BLOCK = 4096  # words: eight loads of 16 bytes in flight per thread
PROGRAMS = 1  # per multiprocessor, 16 KB in flight: as it runs beside others, it need not be fast
FEW = 1024  # numbers per program, where they are read one by one
# The exponent's bits of a number of 16 bits, or of the upper half of one of 32.
EXPONENTS = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80, torch.float32: 0x7F80}


@triton.jit(do_not_specialize=["blocks"])
def check_words_kernel(words, image_strides, sizes, uppers, lowers, status, blocks, BLOCK: tl.constexpr):
    """Grid (programs, N). ``words``: each tensor from a 16-byte boundary on; strides and sizes count words.

    ``uppers``, ``lowers``: the exponent's bits in the halves of a word; 0 for a lower half that is not a number.
    """
    image = tl.program_id(1).to(tl.int64)
    within = 4 * tl.arange(0, BLOCK // 4)[:, None] + tl.arange(0, 4)[None, :]
    found = tl.zeros([BLOCK // 4], tl.int32)
    for number in range(tl.program_id(0), blocks, tl.num_programs(0)):
        level, block = find_level(number, sizes, BLOCK)
        first = pick_pointer(words, level) + image * pick_size(image_strides, level) + block.to(tl.int64) * BLOCK
        first = tl.multiple_of(first, 16)  # a choice among pointers is not known to keep it
        rest = pick_size(sizes, level) - block * BLOCK
        if rest >= BLOCK:
            word = tl.load(first + within)
        else:
            word = tl.load(first + within, mask=within < rest, other=0)
        upper = pick_size(uppers, level) << 16
        lower = pick_size(lowers, level)
        lower = tl.where(lower == 0, upper, lower)
        bad = ((word & upper) == upper) | ((word & lower) == lower)
        found = tl.maximum(found, tl.max(bad.to(tl.int32), axis=1))
    if tl.max(found, axis=0) > 0:
        tl.store(status + image, tl.full((), 1, tl.int64))


@triton.jit
def check_numbers_kernel(
    numbers, image_strides, row_strides, column_strides, columns, sizes, exponents, status,
    IS_HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of all tensors, N). ``numbers``: each tensor's bits; ``columns``: numbers to a row."""
    image = tl.program_id(1).to(tl.int64)
    level, block = find_level(tl.program_id(0), sizes, BLOCK)
    index = block * BLOCK + tl.arange(0, BLOCK)
    inside = index < pick_size(sizes, level)
    width = pick_size(columns, level)
    at = image * pick_size(image_strides, level)
    at += (index // width).to(tl.int64) * pick_size(row_strides, level)
    at += (index % width).to(tl.int64) * pick_size(column_strides, level)
    bits = tl.load(pick_pointer(numbers, level) + at, mask=inside, other=0).to(tl.int32)
    exponent = pick_size(exponents, level)
    if not IS_HALF:
        exponent = exponent << 16
    if tl.max(((bits & exponent) == exponent).to(tl.int32), axis=0) > 0:
        tl.store(status + image, tl.full((), 1, tl.int64))


def launch_find_nonfinite(tensors: Sequence[Tensor], known: Tensor | None) -> Tensor:
    """As :func:`fpn_kernels.find_nonfinite`, without a word to the host; one launch if all tensors are dense."""
    n, device = tensors[0].shape[0], tensors[0].device
    status = torch.zeros(n, dtype=torch.int64, device=device) if known is None else known.clone()
    parts = [_Part.of(tensor) for tensor in _join_all([tensor for tensor in tensors if tensor.numel() > 0])]
    words = [part for part in parts if part.has_words]
    if words:
        _check_words(words, status)
    for size in (2, 4):
        numbers = [part for part in parts if not part.has_words and part.tensor.element_size() == size]
        if numbers:
            _check_numbers(numbers, status, is_half=size == 2)
    return status


@dataclass(frozen=True, slots=True)
class _Part:
    """A tensor (N, ...) of which each image is ``rows`` times ``columns`` numbers, evenly spaced."""

    tensor: Tensor
    rows: int
    row_stride: int
    columns: int
    column_stride: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Part:
        """Copies what is not so spaced."""
        axes = _find_axes(tensor)
        if len(axes) > 2:
            tensor = tensor.contiguous()
            axes = _find_axes(tensor)
        (rows, row_stride), (columns, column_stride) = [(1, 0)] * (2 - len(axes)) + axes
        return cls(tensor, rows, row_stride, columns, column_stride)

    @property
    def size(self) -> int:
        return self.rows * self.columns

    @property
    def has_words(self) -> bool:
        """Each image lies dense from a 16-byte boundary on, and fills whole words."""
        start, image = self.tensor.data_ptr(), self.tensor.stride(0) if len(self.tensor) > 1 else 0
        whole = (self.size | self.tensor.storage_offset()) * self.tensor.element_size() % 4 == 0
        aligned = (start | image * self.tensor.element_size()) % 16 == 0
        return bool(self.rows == 1 and (self.column_stride == 1 or self.columns == 1) and whole and aligned)


def _find_axes(tensor: Tensor) -> list[tuple[int, int]]:
    """Size and stride of as few axes as an image's numbers lie on, the outermost first; at least one axis."""
    axes: list[tuple[int, int]] = []
    pairs = zip(tensor.stride()[1:], tensor.shape[1:], strict=True)
    for stride, size in sorted((pair for pair in pairs if pair[1] > 1), reverse=True):
        if axes and axes[-1][1] == stride * size:
            axes[-1] = axes[-1][0] * size, stride
        else:
            axes.append((size, stride))
    return axes or [(1, 1)]


def _join_all(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors that are slices of one, such as objectness and deltas of a merged head, as that one."""
    joined: list[Tensor] = []
    for tensor in tensors:
        for i, other in enumerate(joined):
            both = _join(other, tensor)
            if both is None:
                both = _join(tensor, other)
            if both is not None:
                joined[i] = both
                break
        else:
            joined.append(tensor)
    return joined


def _join(first: Tensor, second: Tensor) -> Tensor | None:
    """Both, if ``second`` goes on in the same memory, along one axis, where ``first`` ends."""
    if first.dtype != second.dtype or first.stride() != second.stride():
        return None
    if first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr():
        return None
    distance = second.storage_offset() - first.storage_offset()
    for axis in range(1, first.ndim):
        shape = list(first.shape)
        shape[axis] = second.shape[axis]
        if shape == list(second.shape) and distance == first.shape[axis] * first.stride(axis):
            shape[axis] += first.shape[axis]
            return first.as_strided(shape, first.stride())
    return None


def _check_words(parts: Sequence[_Part], status: Tensor) -> None:
    pointers, strides, sizes, lowers = [], [], [], []
    for part in parts:
        tensor = part.tensor
        per_word = 4 // tensor.element_size()
        pointers.append(tensor.as_strided((part.size,), (1,)).view(torch.int32))
        strides.append(tensor.stride(0) // per_word)
        sizes.append(part.size // per_word)
        lowers.append(EXPONENTS[tensor.dtype] if per_word == 2 else 0)
    uppers = [EXPONENTS[part.tensor.dtype] for part in parts]
    packed = (pack_sizes(each) for each in (strides, sizes, uppers, lowers))
    blocks, n = count_blocks(sizes, BLOCK), len(status)
    programs = triton.cdiv(PROGRAMS * _count_processors(status.device), n)
    check_words_kernel[(min(programs, blocks), n)](
        tuple(pointers), *packed, status, blocks, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False
    )


def _check_numbers(parts: Sequence[_Part], status: Tensor, *, is_half: bool) -> None:
    pointers = tuple(part.tensor.view(torch.int16 if is_half else torch.int32) for part in parts)
    columns = (
        [part.tensor.stride(0) for part in parts],
        [part.row_stride for part in parts],
        [part.column_stride for part in parts],
        [part.columns for part in parts],
        [part.size for part in parts],
        [EXPONENTS[part.tensor.dtype] for part in parts],
    )
    check_numbers_kernel[(count_blocks(columns[4], FEW), len(status))](
        pointers, *map(pack_sizes, columns), status, IS_HALF=is_half, BLOCK=FEW, num_warps=4, enable_fp_fusion=False
    )


def _count_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _builds() -> Iterator[Build]:
    """Four levels of features and five of a merged head; the answers of a box head alone."""
    for number in (9, 1):
        tables = dict.fromkeys(("image_strides", "sizes", "uppers", "lowers"), ("i32",) * number)
        yield Build(
            kernel=check_words_kernel,
            variant=str(number),
            signature={"words": ("*i32",) * number, **tables, "status": "*i64", "blocks": "i32"},
            constants={"BLOCK": BLOCK},
        )
    for dtype in ("i16", "i32"):
        names = ("image_strides", "row_strides", "column_strides", "columns", "sizes", "exponents")
        yield Build(
            kernel=check_numbers_kernel,
            variant=dtype,
            signature={"numbers": (f"*{dtype}",) * 5, **dict.fromkeys(names, ("i32",) * 5), "status": "*i64"},
            constants={"IS_HALF": dtype == "i16", "BLOCK": FEW},
        )


BUILDS = tuple(_builds())

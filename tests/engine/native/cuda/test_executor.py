"""The CUDA executor against the CPU's: on the GPU, or on a CPU with Triton's interpreter and torch in cuDNN's place."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from fpn_engine import beside
from fpn_engine.backends.native.branches import Branches
from fpn_engine.backends.native.cpu import DTYPES
from fpn_engine.backends.native.cuda import executor as executor_module
from fpn_engine.backends.native.cuda.choices import Choices
from fpn_engine.backends.native.cuda.executor import CudaExecutor
from fpn_engine.backends.native.cuda.gpu import Gpu
from fpn_engine.backends.native.cuda.tactics import (
    CUBLAS,
    CUDNN_EPILOGUE,
    GEMM,
    IMPLICIT_GEMM,
    Tactic,
    choose,
    supports,
)
from fpn_engine.backends.native.cuda.work import Work
from fpn_engine.backends.native.executor import CpuExecutor
from fpn_engine.backends.native.ops import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    RELU,
    Activate,
    Activation,
    Add,
    Affine,
    AveragePool,
    Cast,
    Concat,
    Conv,
    Flatten,
    GlobalAveragePool,
    Linear,
    MaxPool,
    Mul,
    Op,
    Slice,
    Unflatten,
    Upsample,
)
from fpn_engine.backends.native.program import Program
from fpn_kernels.triton.tiles import FLOAT32_TILE, RAGGED_TILES
from tests.engine.native.cuda.works import H200
from tests.kernels.triton.device import DEVICE

SAME = (1, 1, 1, 1)
# Of the largest magnitude, after a dozen layers.
ERROR = {FLOAT32: 1e-5, FLOAT16: 4e-3, BFLOAT16: 3e-2}


def every_op(dtype: str) -> Program:
    """Each operation once or more, residuals in place and not, an upsampled one, shared outputs, rows."""
    wide = FLOAT32 if dtype != FLOAT32 else None
    ops: list[Op] = [
        Conv(inputs=("x",), output="stem", weight="w", bias="b", stride=(2, 2), padding=SAME, activation=RELU),
        MaxPool(inputs=("stem",), output="c1", kernel=(3, 3), stride=(2, 2), padding=SAME),
        Conv(inputs=("c1",), output="a", weight="v", padding=SAME, activation=RELU),
        Conv(inputs=("a", "c1"), output="c2", weight="u", bias="b", activation=RELU),
        MaxPool(inputs=("c2",), output="c3", kernel=(2, 2), stride=(2, 2)),
        Conv(inputs=("c3",), output="p3", weight="u", bias="b"),
        Conv(inputs=("c2", "p3"), output="p2", weight="u", bias="b", upsample=(2, 2)),
        Upsample(inputs=("p3",), output="up", factor=(2, 2)),
        Add(inputs=("up", "c2"), output="sum", activation=Activation(kind="hardswish")),
        GlobalAveragePool(inputs=("sum",), output="mean"),
        Activate(inputs=("mean",), output="gate", activation=Activation(kind="sigmoid")),
        Mul(inputs=("sum", "gate"), output="gated"),
        Add(inputs=("gated", "mean"), output="shifted"),
        Affine(inputs=("shifted",), output="affine", scale="b", shift="b", activation=RELU),
        AveragePool(inputs=("affine",), output="pooled", kernel=(2, 2), stride=(2, 2)),
        Concat(inputs=("pooled", "p3"), output="both"),
        Conv(inputs=("p2",), output="heads", weight="h", bias="hb", dtype=wide),
        Slice(inputs=("heads",), output="scores", start=0, stop=1),
        Slice(inputs=("heads",), output="deltas", start=1, stop=5),
        Flatten(inputs=("mean",), output="rows"),
        Linear(inputs=("rows",), output="fc", weight="f", bias="b", activation=RELU),
        Unflatten(inputs=("fc",), output="cells", height=2, width=2),
        Linear(inputs=("fc",), output="logits", weight="f", dtype=wide),
    ]
    outputs = ("p2", "both", "scores", "deltas", "logits", "cells")
    if dtype != FLOAT32:
        ops.append(Cast(inputs=("c2",), output="exact", dtype=FLOAT32))
        outputs += ("exact",)
    return Program(input="x", input_dtype=dtype, ops=tuple(ops), outputs=outputs)


def make_weights(dtype: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "w": (8, 3, 3, 3),
        "b": (8,),
        "v": (8, 3, 3, 8),
        "u": (8, 1, 1, 8),
        "h": (5, 1, 1, 8),
        "hb": (5,),
        "f": (8, 8),
    }
    return {name: (torch.randn(s, generator=generator) / 4).to(DTYPES[dtype]) for name, s in shapes.items()}


class Plain(Choices):
    """By rule, but for cuDNN's fused convolution, which has no stand-in on a CPU."""

    def pick(self, work: Work) -> Tactic:
        chosen = choose(work, self.gpu)
        return Tactic(CUDNN_EPILOGUE) if chosen.makes_its_output and DEVICE.type == "cpu" else chosen


class Triton(Choices):
    """Triton wherever it can, so that nothing but it is behind the results."""

    def pick(self, work: Work) -> Tactic:
        tile = FLOAT32_TILE if work.dtype == FLOAT32 else RAGGED_TILES[0]
        wanted = Tactic(GEMM if work.is_pointwise else IMPLICIT_GEMM, tile, 0)
        return wanted if supports(wanted, work, self.gpu) else choose(work, self.gpu)


def gpu() -> Gpu:
    return Gpu.of_device(DEVICE) if DEVICE.type == "cuda" else H200


def make_executor(dtype: str, kind: type[Choices] = Plain, **changes: Tensor) -> CudaExecutor:
    return CudaExecutor(every_op(dtype), make_weights(dtype) | changes, kind(gpu()), DEVICE)


def make_input(n: int = 2, h: int = 16, w: int = 24, seed: int = 1) -> Tensor:
    return torch.randn(n, h, w, 3, generator=torch.Generator().manual_seed(seed))


def assert_same(ours: list[Tensor], theirs: list[Tensor], dtype: str) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert a.device.type == DEVICE.type
        error = (a.double().cpu() - b.double()).abs().max()
        assert error <= ERROR[dtype] * b.double().abs().max()


@pytest.mark.parametrize("kind", [Plain, Triton])
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16])
def test_equals_the_cpu(dtype: str, kind: type[Choices]) -> None:
    program, weights = every_op(dtype), make_weights(dtype)
    exact = {name: tensor.float() for name, tensor in weights.items()}
    expected = CpuExecutor(every_op(FLOAT32), exact)(make_input())
    executor = CudaExecutor(program, weights, kind(gpu()), DEVICE)
    ours = executor(make_input().to(DEVICE))
    assert {t.dtype for t in ours[2:5]} == {torch.float32}
    for a, b in zip(ours, expected, strict=False):
        assert (a.double().cpu() - b.double()).abs().max() <= ERROR[dtype] * b.double().abs().max()
    kept = [tensor.clone() for tensor in ours]
    executor(make_input(seed=2).to(DEVICE))
    assert all(torch.equal(a, b) for a, b in zip(ours, kept, strict=True)), "outputs are the caller's to keep"


def test_float16_on_the_cpu_is_what_the_gpu_computes() -> None:
    """One rounding per operation: as the Triton kernels have it."""
    program, weights = every_op(FLOAT16), make_weights(FLOAT16)
    assert_same(
        make_executor(FLOAT16, Triton)(make_input().to(DEVICE)), CpuExecutor(program, weights)(make_input()), FLOAT16
    )


def test_nchw_images_and_other_number_types() -> None:
    executor = make_executor(FLOAT16)
    expected = executor(make_input().half().to(DEVICE))
    images = make_input().half().permute(0, 3, 1, 2).contiguous().to(DEVICE)
    for x in (images.permute(0, 2, 3, 1), images.permute(0, 2, 3, 1).float()):
        assert all(torch.equal(a, b) for a, b in zip(executor(x), expected, strict=True))


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16])
def test_nan_is_not_hidden(dtype: str) -> None:
    broken = make_weights(dtype)["w"]
    broken[0, 0, 0, 0] = torch.nan
    for kind in (Plain, Triton):
        outputs = make_executor(dtype, kind, w=broken)(make_input().to(DEVICE))
        assert outputs[0].isnan().any()


def test_memory_is_planned_and_reported() -> None:
    executor = make_executor(FLOAT16)
    memory = executor.plan((2, 16, 24, 3))
    assert memory.arena_bytes < memory.total_bytes
    assert memory.in_place.get("c2") == 1
    assert "stem" in memory.offsets
    assert not {"p2", "both", "heads", "logits"} & set(memory.offsets), "outputs outlast the call"


def test_what_makes_its_output_overwrites_nothing() -> None:
    class Fused(Choices):
        def pick(self, work: Work) -> Tactic:
            return Tactic("cudnn_fused") if work.activation == RELU and work.is_convolution else choose(work, self.gpu)

    memory = make_executor(BFLOAT16, Fused).plan((2, 16, 24, 3))
    assert not {"stem", "a", "c2"} & set(memory.offsets)
    assert "c2" not in memory.in_place
    assert "c2" in make_executor(BFLOAT16, Triton).plan((2, 16, 24, 3)).in_place or "c1" in memory.offsets


def pyramid() -> Program:
    """Two levels that go on by themselves; the small one's outputs, in the arena and not, are aside."""
    ops: list[Op] = [
        Conv(inputs=("x",), output="c2", weight="w", bias="b", padding=SAME, activation=RELU),
        MaxPool(inputs=("c2",), output="c3", kernel=(2, 2), stride=(2, 2)),
        Conv(inputs=("c3",), output="m3", weight="u", bias="b"),
        Conv(inputs=("c2", "m3"), output="p2", weight="u", bias="b", upsample=(2, 2)),
        Conv(inputs=("m3",), output="p3", weight="v", padding=SAME),
        Conv(inputs=("p2",), output="r2", weight="v", padding=SAME, activation=RELU),
        Conv(inputs=("p3",), output="r3", weight="v", padding=SAME, activation=RELU),
        Conv(inputs=("r2",), output="o2", weight="u", bias="b"),
        Conv(inputs=("r3",), output="o3", weight="u", bias="b"),
    ]
    return Program(input="x", ops=tuple(ops), outputs=("p2", "p3", "o2", "o3"))


@pytest.mark.parametrize("aside_first", [True, False])
def test_branches_may_run_in_any_order(aside_first: bool) -> None:
    shape = (2, 16, 24, 3)
    program, weights = pyramid(), make_weights(FLOAT32)
    expected = CpuExecutor(program, weights)(make_input())
    executor = CudaExecutor(program, weights, Plain(gpu()), DEVICE)
    assert_same(executor(make_input().to(DEVICE)), expected, FLOAT32)
    prepared = executor._prepared[shape]
    assert prepared.branches == Branches(3, frozenset({4, 6, 8}))
    order = sorted(range(3, 9), key=lambda i: (i in prepared.branches.aside) != aside_first)
    steps = [prepared.steps[i] for i in (0, 1, 2, *order)]
    executor._prepared[shape] = dataclasses.replace(prepared, steps=steps, branches=Branches(3, frozenset()))
    assert_same(executor(make_input().to(DEVICE)), expected, FLOAT32)


def test_shapes_and_threads() -> None:
    executor, reference = make_executor(FLOAT32), CpuExecutor(every_op(FLOAT32), make_weights(FLOAT32))
    inputs = [make_input(1 + i % 2, 16 + 8 * (i % 3), 16, i) for i in range(6)]
    # Triton's interpreter serves one thread at a time.
    with ThreadPoolExecutor(3 if DEVICE.type == "cuda" else 1) as pool:
        answers = list(pool.map(executor, [x.to(DEVICE) for x in inputs]))
    for x, ours in zip(inputs, answers, strict=True):
        assert_same(ours, reference(x), FLOAT32)
    with pytest.raises(ValueError, match="5 channels on a weight"):
        executor(torch.zeros(1, 8, 8, 5, device=DEVICE))


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16])
def test_what_a_graph_reads_outlives_the_shape(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that were filled up or cast for one shape are read by its graphs when the shape itself is forgotten."""
    monkeypatch.setattr(executor_module, "MAX_PREPARED", 1)

    class Libraries(Choices):
        def pick(self, work: Work) -> Tactic:
            return Tactic(CUDNN_EPILOGUE if work.is_convolution else CUBLAS)

    executor = CudaExecutor(every_op(dtype), make_weights(dtype), Libraries(gpu()), DEVICE)
    given = make_input(1).to(DEVICE, DTYPES[dtype])
    executor(given)
    made = {key: tensor.data_ptr() for key, tensor in executor._weights._made.items()}
    assert made.keys() >= {("w", DTYPES[dtype], "filled"), ("h", torch.float32), ("f", torch.float32)}
    executor(make_input(2).to(DEVICE))
    assert len(executor._prepared) == 1
    executor(given)
    assert {key: tensor.data_ptr() for key, tensor in executor._weights._made.items()} == made


@pytest.mark.gpu
@pytest.mark.parametrize("make", [every_op, lambda dtype: pyramid()])
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16])
def test_capturable(dtype: str, make: Callable[[str], Program]) -> None:
    """No word to the host; one graph for all values, its addresses its own although other shapes came between."""
    executor = CudaExecutor(make(dtype), make_weights(dtype), Plain(gpu()), DEVICE)
    given, other = make_input().to(DEVICE), make_input(seed=5).to(DEVICE)
    expected = [executor(x) for x in (given, other)]
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode warns that it is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        executor(given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    static = given.clone()
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with beside.using(side):
        executor(static)
        with torch.cuda.graph(graph):
            outputs = executor(static)
    executor(make_input(4, 128, 128).to(DEVICE))
    for x, wanted in ((other, expected[1]), (given, expected[0])):
        static.copy_(x)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(outputs, wanted, strict=True))

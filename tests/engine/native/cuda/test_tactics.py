"""Tactics: what supports what, what is measured, what is taken unmeasured; and that each of them computes the same."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fpn_engine.backends.native.cuda import tuning
from fpn_engine.backends.native.cuda.choices import Choices
from fpn_engine.backends.native.cuda.gpu import TARGETS, Gpu
from fpn_engine.backends.native.cuda.runs import Weights, make_tactic_run
from fpn_engine.backends.native.cuda.tactics import (
    CUBLAS,
    CUDNN_EPILOGUE,
    CUDNN_FUSED,
    FEW_CHANNELS,
    GEMM,
    IMPLICIT_GEMM,
    LEVELS,
    STREAM,
    WHOLE,
    Tactic,
    candidates,
    choose,
    count_tiles,
    supports,
)
from fpn_engine.backends.native.cuda.work import Work
from fpn_engine.backends.native.ops import BFLOAT16, FLOAT32, Activation
from fpn_engine.errors import BackendError
from fpn_kernels.triton.tiles import FEW_CHANNELS_TILES, LARGE_TILE, RAGGED_TILES, TILES, Tile
from tests.engine.native.cuda.works import H200, REAL, SMALL, conv, linear
from tests.kernels.triton.device import DEVICE


def names(work: Work, level: str = "full") -> set[str]:
    return {tactic.name for tactic in candidates(work, H200, level)}


def test_what_is_measured() -> None:
    assert names(REAL["layer1 1x1"]) == {CUDNN_FUSED, CUDNN_EPILOGUE, GEMM}
    assert names(REAL["layer1 3x3"]) == {CUDNN_FUSED, CUDNN_EPILOGUE, IMPLICIT_GEMM}
    assert names(REAL["stem"]) == {CUDNN_FUSED, CUDNN_EPILOGUE, IMPLICIT_GEMM, FEW_CHANNELS}
    assert names(REAL["stem"], "quick") == {CUDNN_FUSED, CUDNN_EPILOGUE, FEW_CHANNELS}
    assert names(REAL["lateral"]) == names(REAL["downsample"]) == {CUDNN_EPILOGUE, GEMM}
    assert names(REAL["output"]) == {CUDNN_EPILOGUE, IMPLICIT_GEMM}
    assert names(REAL["grouped"]) == {CUDNN_FUSED, CUDNN_EPILOGUE}
    assert names(REAL["fc6"]) == names(REAL["predictor"]) == {CUBLAS, GEMM}
    hardswish = Activation(kind="hardswish")
    assert names(conv(8, 8, 64, 64, activation=hardswish)) == {CUDNN_EPILOGUE, GEMM}
    assert CUDNN_FUSED not in names(conv(8, 8, 64, 64, dtype=FLOAT32)), "it would compute in TF32"
    assert CUDNN_FUSED not in names(conv(8, 8, 64, 64, 3, padding=(0, 0, 1, 1)))


def test_few_channels() -> None:
    tactic = Tactic(FEW_CHANNELS, FEW_CHANNELS_TILES[0])
    for work in (REAL["stem"], conv(8, 8, 3, 16, 3, 2), conv(8, 8, 4, 16, 7), conv(8, 7, 1, 16, 5, dtype=BFLOAT16)):
        assert choose(work, H200) == tactic
    for work in (
        conv(8, 8, 3, 16, 3, 2, dtype=FLOAT32),
        conv(8, 8, 3, 16),
        conv(8, 8, 5, 16, 3),
        conv(8, 8, 3, 16, 3, has_residual=True),
        conv(8, 8, 3, 16, 3, padding=(2, 2, 2, 2), dilation=(2, 2)),
        conv(8, 8, 2, 16, 3, groups=2, weight=(16, 3, 3, 1)),
        conv(32, 32, 3, 16, 11, 4),
        linear(4, 3, 16),
    ):
        assert not supports(tactic, work, H200), work.key
    assert not supports(Tactic(FEW_CHANNELS, TILES[0]), REAL["stem"], H200)


def splits_of(name: str) -> set[int]:
    return {tactic.split for tactic in candidates(REAL[name], H200, "full") if tactic.tile}


def test_the_deep_small_maps_are_shared() -> None:
    for name in ("layer4 1x1", "layer4 3x3", "fc6"):
        assert splits_of(name) == {WHOLE, 2, 4, 8, STREAM}, name
    assert splits_of("stem") == {WHOLE}, "thousands of tiles"
    assert splits_of("layer1 1x1") == {WHOLE}, "one block deep"


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("target", TARGETS)
def test_what_is_taken_unmeasured_is_supported(name: str, target: str) -> None:
    gpu, work = Gpu.of_target(target), REAL[name]
    chosen = choose(work, gpu)
    assert supports(chosen, work, gpu)
    for level in LEVELS:
        found = candidates(work, gpu, level)
        assert found[0] == chosen
        assert all(supports(tactic, work, gpu) for tactic in found)
        assert len(found) == len(set(found))
    assert len(candidates(work, gpu, "quick")) <= 8


def test_a_good_guess() -> None:
    assert choose(REAL["layer1 1x1"], H200) == Tactic(GEMM, TILES[0])
    assert choose(REAL["layer4 1x1"], H200) == Tactic(GEMM, TILES[3])
    small = conv(13, 19, 2048, 512)
    deep = choose(small, H200)
    assert deep == Tactic(GEMM, TILES[3], 4)
    assert deep.tile is not None
    assert count_tiles(small, deep.tile) * deep.split > 0.75 * H200.processors
    assert choose(REAL["rpn"], H200) == Tactic(CUDNN_EPILOGUE), "NaN stays NaN"
    window = conv(50, 76, 256, 256, 3, dtype=BFLOAT16)
    assert choose(window, H200) == Tactic(CUDNN_EPILOGUE), "without a residual it would read what lay in memory"
    assert choose(dataclasses.replace(window, has_residual=True), H200) == Tactic(CUDNN_FUSED)
    assert choose(REAL["rpn head"], H200).name == choose(REAL["predictor"], H200).name == GEMM
    assert choose(REAL["fc6"], H200) == Tactic(CUBLAS)
    assert choose(conv(8, 8, 64, 64, dtype=FLOAT32), H200) == Tactic(CUDNN_EPILOGUE)


def test_tiles_that_do_not_fit() -> None:
    small = dataclasses.replace(H200, shared_bytes=99 << 10)
    large = Tactic(IMPLICIT_GEMM, LARGE_TILE)
    assert supports(large, REAL["rpn"], H200)
    assert not supports(large, REAL["rpn"], small)
    assert not supports(Tactic(GEMM, LARGE_TILE), REAL["layer1 1x1"], H200), "no room for a residual"
    assert {t.tile for t in candidates(REAL["stem"], H200, "full") if t.tile} == {*RAGGED_TILES, *FEW_CHANNELS_TILES}
    assert {t.tile for t in candidates(conv(8, 8, 192, 64), H200, "full") if t.tile} == {
        tile for tile in (LARGE_TILE, *TILES) if tile.k == 64
    }


def test_text() -> None:
    few = Tactic(FEW_CHANNELS, FEW_CHANNELS_TILES[1])
    for tactic in (Tactic(CUBLAS), Tactic(GEMM, TILES[1], 4), Tactic(IMPLICIT_GEMM, LARGE_TILE, STREAM), few):
        assert Tactic.parse(str(tactic)) == tactic
    assert str(Tactic(GEMM, TILES[0], STREAM)) == "triton_gemm 128x128x64 w8 s3 /stream"
    odd = [
        "",
        "magic",
        "cublas 1x1",
        "triton_gemm",
        "cublas 128x128x64 w8 s3 /1",
        f"{Tactic(GEMM, Tile(2, 2, 2, 1, 1))}",
        f"{Tactic(GEMM, FEW_CHANNELS_TILES[1])}",
        f"{Tactic(FEW_CHANNELS, TILES[0])}",
        f"{Tactic(FEW_CHANNELS, FEW_CHANNELS_TILES[1], 2)}",
    ]
    for text in [*odd, "triton_gemm 128x128x64 w8 s3 /65", "triton_gemm 128x128x64 w8 s3 /4 "]:
        with pytest.raises(ValueError, match="there is no tactic"):
            Tactic.parse(text)


def test_an_unknown_target() -> None:
    with pytest.raises(BackendError, match="there is no target 'sm_75'; take one of sm_80, sm_86, sm_89, sm_90"):
        Gpu.of_target("sm_75")


def test_the_nearest_measured_choice() -> None:
    measured, other = conv(50, 76, 256, 256, 3), Tactic(IMPLICIT_GEMM, TILES[2])
    choices = Choices(H200, {measured.key: other, conv(25, 38, 256, 256, 3).key: Tactic(CUDNN_EPILOGUE)})
    assert choices.pick(measured) == other
    assert choices.pick(conv(76, 50, 256, 256, 3)) == other
    assert choices.pick(conv(24, 40, 256, 256, 3)) == Tactic(CUDNN_EPILOGUE)
    far, otherwise = conv(400, 608, 256, 256, 3), conv(50, 76, 256, 128, 3)
    assert choices.pick(far) == choose(far, H200)
    assert choices.pick(otherwise) == choose(otherwise, H200)


def test_a_choice_that_is_not_supported_is_passed_over() -> None:
    work = REAL["lateral"]
    assert Choices(H200, {work.key: Tactic(CUDNN_FUSED)}).pick(work) == choose(work, H200)


def test_keys_tell_work_apart() -> None:
    works = [*REAL.values(), *SMALL.values(), conv(8, 8, 64, 64, has_bias=False), conv(8, 8, 64, 64)]
    assert len({work.key for work in works}) == len(works)


@pytest.mark.parametrize("name", SMALL)
def test_every_tactic_computes_the_same(name: str) -> None:
    """As the tuner checks it, against float32; on a CPU torch stands in for cuDNN, and the fused one is left out."""
    work = SMALL[name]
    given = tuning._make_inputs(work, DEVICE, seed=1)
    expected = tuning._compute_float32(work, given)
    out = torch.empty(work.out, dtype=expected.to(tuning.DTYPES[work.out_dtype]).dtype, device=DEVICE)
    for tactic in candidates(work, H200, "quick"):
        if tactic.makes_its_output and DEVICE.type == "cpu":
            continue
        run = make_tactic_run(tactic, work.op(), work, Weights(given), processors=3)
        assert tuning._find_error(work, [tuning._bind(run, given, out, work)], [expected], out) == "", tactic
        assert tactic.makes_its_output or tuning._find_hidden_nan(work, run, given, out) == "", tactic


@pytest.mark.parametrize("tactic", [Tactic(CUDNN_EPILOGUE), Tactic(GEMM, TILES[3], 2)], ids=str)
def test_onto_the_residual(tactic: Tactic) -> None:
    work = conv(4, 6, 512, 16, has_residual=True)
    given = tuning._make_inputs(work, DEVICE, seed=1)
    expected = tuning._compute_float32(work, given)
    run = make_tactic_run(tactic, work.op(), work, Weights(given), processors=3)
    result = run([given["x"], given["residual"]], given["residual"])
    assert result.data_ptr() == given["residual"].data_ptr()
    torch.testing.assert_close(result.float(), expected, rtol=2**-9, atol=2**-9)


@pytest.mark.gpu
@pytest.mark.parametrize("name", REAL)
def test_real_layers(name: str) -> None:
    """On the GPU, at the sizes of R50-FPN; cuDNN's fused one may only fail by hiding NaN."""
    gpu = Gpu.of_device(DEVICE)
    for dtype in (REAL[name].dtype, BFLOAT16):
        wide = REAL[name].out_dtype == FLOAT32
        work = dataclasses.replace(REAL[name], dtype=dtype, out_dtype=FLOAT32 if wide else dtype)
        given = tuning._make_inputs(work, DEVICE, seed=1)
        expected = tuning._compute_float32(work, given)
        out = torch.empty(work.out, dtype=tuning.DTYPES[work.out_dtype], device=DEVICE)
        for tactic in candidates(work, gpu, "quick"):
            run = make_tactic_run(tactic, work.op(), work, Weights(given), gpu.processors)
            problem = tuning._find_error(work, [tuning._bind(run, given, out, work)], [expected], out)
            assert problem == "", tactic
            if not tactic.makes_its_output:
                assert tuning._find_hidden_nan(work, run, given, out) == "", tactic


def test_launches_compile() -> None:
    """As they do on a GPU, where Triton itself finds the types; the interpreter knows none."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-W", "error::UserWarning", "-m", "tests.engine.native.cuda.compile_works"]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[4], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 15


def test_rows_are_work_too() -> None:
    assert linear(3, 64, 8).is_pointwise
    assert not linear(3, 64, 8).is_convolution

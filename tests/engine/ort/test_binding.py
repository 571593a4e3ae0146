"""IO binding with the CPU provider: the code that runs on a GPU, with true numbers."""

from __future__ import annotations

import threading

import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper

from fpn_engine.backends.ort import open_session
from fpn_engine.backends.ort_binding import BoundSession, CpuPlace
from fpn_engine.errors import BackendError

WIDTH = 4


def make_session(kind: int = TensorProto.FLOAT, out: int = TensorProto.FLOAT) -> ort.InferenceSession:
    """y = x + x, z = -x cast to ``out``."""
    nodes = [
        helper.make_node("Add", ["x", "x"], ["y"]),
        helper.make_node("Neg", ["x"], ["n"]),
        helper.make_node("Cast", ["n"], ["z"], to=out),
    ]
    value = helper.make_tensor_value_info
    outputs = [value("y", kind, ["n", WIDTH]), value("z", out, ["n", WIDTH])]
    graph = helper.make_graph(nodes, "g", [value("x", kind, ["n", WIDTH])], outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return open_session(model.SerializeToString(), 1)


def shapes(n: int) -> dict[str, tuple[int, ...]]:
    return {"y": (n, WIDTH), "z": (n, WIDTH)}


@pytest.mark.parametrize("n", [1, 3, 1000])
def test_numbers(n: int) -> None:
    x = torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(n))
    found = BoundSession(make_session(), CpuPlace())(x, shapes(n))
    assert torch.equal(found["y"], x + x)
    assert torch.equal(found["z"], -x)


def test_inputs_that_are_not_dense_or_of_another_type() -> None:
    x = torch.arange(12, dtype=torch.float64).view(WIDTH, 3).T
    assert torch.equal(BoundSession(make_session(), CpuPlace())(x, shapes(3))["z"], -x.float())


def test_halves() -> None:
    session = BoundSession(make_session(TensorProto.FLOAT16, TensorProto.FLOAT), CpuPlace())
    found = session(torch.full((2, WIDTH), 0.1), shapes(2))
    assert found["y"].dtype == torch.float16
    assert torch.equal(found["z"], -torch.full((2, WIDTH), 0.1).half().float())


def test_no_rows_do_not_run() -> None:
    found = BoundSession(make_session(), CpuPlace())(torch.zeros(0, WIDTH), shapes(0))
    assert [tuple(tensor.shape) for tensor in found.values()] == [(0, WIDTH), (0, WIDTH)]


def test_results_are_the_callers_to_keep() -> None:
    session = BoundSession(make_session(), CpuPlace())
    first = session(torch.ones(2, WIDTH), shapes(2))["y"]
    session(torch.zeros(2, WIDTH), shapes(2))
    assert torch.equal(first, torch.full((2, WIDTH), 2.0))


def test_threads() -> None:
    session, wrong = BoundSession(make_session(), CpuPlace()), []

    def work(number: int) -> None:
        for _ in range(50):
            x = torch.full((8, WIDTH), float(number))
            if not torch.equal(session(x, shapes(8))["y"], x + x):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_wrong_shape_is_an_error() -> None:
    with pytest.raises(BackendError, match="ONNX Runtime failed while running the model"):
        BoundSession(make_session(), CpuPlace())(torch.zeros(2, WIDTH), shapes(3))


def test_other_number_types_are_refused() -> None:
    with pytest.raises(BackendError, match=r"the model's z is a tensor\(double\); build the plan again"):
        BoundSession(make_session(out=TensorProto.DOUBLE), CpuPlace())

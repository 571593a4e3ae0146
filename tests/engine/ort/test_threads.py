"""Threads of ONNX Runtime on the CPU."""

from __future__ import annotations

import os

import pytest

from fpn_engine.backends.ort import session_options


@pytest.mark.parametrize(("asked", "taken"), [(None, 0), (1, 1), (3, 3), (1024, 4)])
def test_no_more_threads_than_cores(asked: int | None, taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert session_options(asked).intra_op_num_threads == taken

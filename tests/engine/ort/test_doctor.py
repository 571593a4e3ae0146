"""The doctor on providers that cannot be loaded."""

from __future__ import annotations

from fpn_engine.doctor import examine
from fpn_engine.doctor.probes import probe_onnxruntime
from tests.engine.fake_machine import NO_GPU, REPLIES, FakeMachine

MISSING = "libcurand.so.10: cannot open shared object file: No such file or directory"


def test_a_missing_library_is_named_with_the_remedy() -> None:
    replies = {"onnxruntime": {**REPLIES["onnxruntime"], "cuda": MISSING}}
    (found,) = (finding for finding in examine(FakeMachine(replies=replies)) if MISSING in finding.message)
    assert (found.kind, found.topic) == ("note", "onnxruntime")
    assert found.message.startswith("onnxruntime-gpu 1.31.1 cannot load its CUDA provider")
    assert found.remedy == "pip install 'onnxruntime-gpu[cuda,cudnn]'"


def test_without_a_gpu_it_does_not_matter() -> None:
    replies = {**NO_GPU, "onnxruntime": {**REPLIES["onnxruntime"], "cuda": MISSING}}
    assert not [finding for finding in examine(FakeMachine(replies=replies)) if MISSING in finding.message]


def test_what_is_here() -> None:
    reason = probe_onnxruntime()["cuda"]
    assert reason is None or ".so" in reason

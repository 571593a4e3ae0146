"""tests/gpu.sh: what it does without a GPU, and which tests it runs under compute-sanitizer."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "gpu.sh"
KERNELS = ("candidates", "decode", "nms", "preprocess", "roi_align", "roi_pool", "selection", "topdown", "windows")


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes the time of all that it runs")
def test_without_a_gpu_it_says_so():
    done = subprocess.run(["bash", str(SCRIPT), sys.executable], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "no CUDA device here\n")


def test_sanitized_are_tests_of_every_kernel_that_launch_it_once():
    [selected] = re.findall(r'^selected="(.+)"$', SCRIPT.read_text(), re.MULTILINE)
    words = selected.split(" or ")
    for path in (SCRIPT.parent / "kernels" / "triton").glob("test_*.py"):
        tests = re.findall(r"^def (test_\w+)\((.*?)(?=^def |\Z)", path.read_text(), re.MULTILINE | re.DOTALL)
        chosen = [body for name, body in tests if any(word in name for word in words)]
        assert chosen or path.stem.removeprefix("test_") not in KERNELS
        assert not any("assert_capturable(" in body for body in chosen), "a thousand replays"

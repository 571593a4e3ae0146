"""The command line in two processes, as torchrun starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence


def run_in_two(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """``fpn-engine`` with these arguments, in processes of one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += ["-m", "fpn_engine", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)

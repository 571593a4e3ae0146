"""The ``fpn-engine`` command: how it starts and ends. The commands themselves are put together in ``app``."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from typing import NoReturn

STOPPED = {128 + signal.SIGINT: "interrupted", 128 + signal.SIGTERM: "terminated"}


def main() -> NoReturn:
    """Run the command line: errors that users can cause become one sentence and an exit code."""
    _prepare_process()
    # Imported after the signals are taken care of: an impatient Ctrl-C meets no traceback.
    from fpn_engine.cli.app import app
    from fpn_engine.cli.console import fail, note
    from fpn_engine.errors import FpnEngineError

    try:
        os.getcwd()
    except OSError:  # or libraries that look for themselves end the process
        fail("the current folder does not exist any more; change to another one")
    try:
        app()
    except SystemExit as end:
        if end.code in STOPPED:
            note(f"fpn-engine: {STOPPED[end.code]}")
        raise
    except FpnEngineError as error:
        fail(str(error))
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if os.environ.get("FPN_ENGINE_DEBUG"):
            raise
        fail(f"internal error: {type(error).__name__}: {error}; FPN_ENGINE_DEBUG=1 shows where, please report it")
    sys.exit(0)


def _prepare_process() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup and background jobs ignore them on purpose
            signal.signal(number, _stop)
    for name in ("stdout", "stderr"):  # None where the caller closed it; print() would then take the other one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # they speak to programmers, about libraries
    # Threads that wait must not spin: on a busy machine each small op would then last a scheduler's time slice
    # (measured: 1000 ms of NMS for 20). Read once, when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _stop(number: int, frame: object) -> NoReturn:
    """Unwind, so that half-written files are removed."""
    raise SystemExit(128 + number)

"""TensorRT's Python bindings: the one place where they are imported, 10.x and 11.x alike."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from fpn_engine.errors import BackendError

OLDEST = (10, 7)  # of the API that is used here; pyproject.toml says the same
INSTALL = "pip install 'fpn-engine[tensorrt]'"


class Bindings:
    """The module and the one logger that all of its objects share, as TensorRT asks for.

    Attributes: trt: the module ``tensorrt``. version: such as "11.4.0.106".
    """

    def __init__(self, trt: Any) -> None:
        self.trt = trt
        self.version = str(trt.__version__)
        self.logger = _make_logger(trt)

    def take_errors(self) -> str:
        """What TensorRT complained about since the last call, as one line; a plain phrase if it did not."""
        lines = [" ".join(line.split()) for line in self.logger.errors]
        self.logger.errors.clear()
        return "; ".join(lines) or "it gives no reason"


@functools.cache
def load_bindings() -> Bindings:
    """Import TensorRT.

    Raises: BackendError, one sentence with the remedy, if it is missing, broken or too old.
    """
    try:
        trt = _import()
    except ModuleNotFoundError as error:
        if error.name not in ("tensorrt", "tensorrt_bindings"):
            raise _broken(error) from None
        raise BackendError(f"TensorRT is not installed; install it with: {INSTALL}") from None
    except (ImportError, OSError) as error:
        raise _broken(error) from None
    version = str(trt.__version__)
    if tuple(int(number) for number in version.split(".")[:2]) < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        raise BackendError(f"TensorRT {version} is too old, {wanted} or newer is needed; upgrade with: {INSTALL} -U")
    return Bindings(trt)


def _import() -> Any:
    try:
        return importlib.import_module("tensorrt")
    except ModuleNotFoundError as error:
        if error.name != "tensorrt":
            raise
    return importlib.import_module("tensorrt_bindings")  # its name where they were installed by themselves


def _broken(error: Exception) -> BackendError:
    return BackendError(f"TensorRT cannot be imported ({error}); see what is wrong with: fpn-engine doctor")


def _make_logger(trt: Any) -> Any:
    serious = (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR)

    class Logger(trt.ILogger):
        """Keeps errors for the exception that follows; everything else is TensorRT's own affair."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in serious:
                self.errors.append(msg)

    return Logger()

"""fpn-engine: run Feature Pyramid Network detectors fast and prove that they still find the same objects."""

import importlib
from typing import TYPE_CHECKING

from fpn_engine.errors import FpnEngineError
from fpn_engine.spec import Category, ModelSpec

if TYPE_CHECKING:
    from fpn_engine.detections import Detection, Detections
    from fpn_engine.engine import Engine

__version__ = "0.1.0.dev0"  # pyproject.toml says the same; a test holds them together
__all__ = ["Category", "Detection", "Detections", "Engine", "FpnEngineError", "ModelSpec", "__version__"]

# Imported when they are asked for: NumPy takes longer to import than --help should take altogether.
_MODULES = {"Detection": "detections", "Detections": "detections", "Engine": "engine"}


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return getattr(importlib.import_module(f"fpn_engine.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""fpn-engine: run Feature Pyramid Network detectors fast and prove that they still find the same objects."""

from typing import TYPE_CHECKING

from fpn_engine.detections import Detection, Detections
from fpn_engine.errors import FpnEngineError
from fpn_engine.spec import Category, ModelSpec

if TYPE_CHECKING:
    from fpn_engine.engine import Engine

__version__ = "0.1.0.dev0"  # pyproject.toml says the same; a test holds them together
__all__ = ["Category", "Detection", "Detections", "Engine", "FpnEngineError", "ModelSpec", "__version__"]


def __getattr__(name: str) -> object:
    """``Engine`` is imported when it is asked for: it needs torch, which takes seconds to import."""
    if name == "Engine":
        from fpn_engine.engine import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

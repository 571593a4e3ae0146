"""fpn-engine: run Feature Pyramid Network detectors fast and prove that they still find the same objects."""

from importlib.metadata import version

from fpn_engine.detections import Detection, Detections
from fpn_engine.errors import FpnEngineError
from fpn_engine.spec import Category, ModelSpec

__all__ = ["Category", "Detection", "Detections", "FpnEngineError", "ModelSpec"]

__version__ = version("fpn-engine")

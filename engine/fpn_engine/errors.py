"""The one exception family for everything a user can cause; the command line prints them as one sentence."""


class FpnEngineError(Exception):
    """Something the caller can put right; the message says what and how."""


class SpecError(FpnEngineError, ValueError):
    """A model specification with an unknown key or a value outside its range."""


class OptionError(FpnEngineError, ValueError):
    """An option outside of what this model or device allows."""


class ImageError(FpnEngineError):
    """An image that cannot be read or is refused."""


class CheckpointError(FpnEngineError):
    """A checkpoint that cannot be read or does not hold an FPN detector."""


class ModelError(FpnEngineError):
    """An ONNX file that cannot be read, is damaged, or is not one of ours."""


class PlanError(FpnEngineError):
    """A plan that cannot be read, is damaged, or does not fit this machine or version."""


class BackendError(FpnEngineError):
    """A backend that is not available here or failed while running."""


class NonFiniteError(FpnEngineError):
    """A network that produced NaN or infinity for an image: its detections would be meaningless."""


class ProposalError(FpnEngineError):
    """Proposals that cannot be read, do not belong to the images, or are given to a model that finds its own."""


class AnnotationError(FpnEngineError):
    """Annotations that cannot be read or do not match the images."""


class DownloadError(FpnEngineError):
    """A file that the network, its server or the disk refuses, or that is not the published one."""


class DeviceMemoryError(FpnEngineError):
    """A device without the memory for an image."""

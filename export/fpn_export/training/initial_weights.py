"""Initial weights from a file: an ImageNet classifier or a detector (Lin et al. 2017, sec. 5)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from fpn_engine.errors import CheckpointError
from fpn_export.checkpoint_file import read_checkpoint
from fpn_export.detector import FpnDetector
from fpn_export.state_dict import normalize_names

BODY = "backbone.body."
HEAD = "roi_heads.box_head."  # where a conv5 head keeps the classifier's last stage


class Taken(NamedTuple):
    """What became of a file: its digest, and the model's tensors that it did not have."""

    sha256: str
    missing: list[str]


def load_initial_weights(model: FpnDetector, path: Path) -> Taken:
    """Copy into ``model`` every tensor that the file has under the same name and shape.

    A classifier with torchvision's ResNet names gives the bottom-up network. A detector gives all that fits, which
    leaves out the predictors where the classes are others.

    Raises: CheckpointError for a file that cannot be read, or whose bottom-up network is not the model's.
    """
    file = read_checkpoint(path)
    given = normalize_names(file.tensors)
    if _has_classifier_names(given):
        body = {name: tensor for name, tensor in given.items() if not name.startswith("fc.")}
        given = {f"{BODY}{name}": tensor for name, tensor in body.items()}
        given |= {f"{HEAD}{name}": tensor for name, tensor in body.items() if name.startswith("layer4.")}
    expected = model.state_dict()
    fitting = {name: t.to(expected[name].dtype) for name, t in given.items() if _fits(t, expected.get(name))}
    missing = [name for name in expected if name not in fitting and not name.endswith(".num_batches_tracked")]
    lacking = [name for name in missing if name.startswith(BODY)]
    if lacking:
        raise CheckpointError(
            f"{path} has no bottom-up network for a {model.spec.arch} of width {model.spec.body_width} "
            f"({lacking[0]} is missing or of another shape); name the right --arch or leave out --init"
        )
    model.load_state_dict(fitting, strict=False)
    return Taken(file.sha256, missing)


def is_classifier(path: Path) -> bool:
    """Whether the file holds a ResNet classifier, not a detector. Raises: CheckpointError if it cannot be read."""
    return _has_classifier_names(normalize_names(read_checkpoint(path).tensors))


def _has_classifier_names(tensors: Mapping[str, Tensor]) -> bool:
    return "conv1.weight" in tensors and not any(name.startswith("backbone.") for name in tensors)


def _fits(tensor: Tensor, expected: Tensor | None) -> bool:
    return expected is not None and tensor.shape == expected.shape

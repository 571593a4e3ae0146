"""Fast R-CNN heads on pooled features (Lin et al. 2017, sec. 4.2): hidden layers, then class and box."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from fpn_engine.spec import ModelSpec
from fpn_export.resnet import make_stage

CONV5_STAGE = 4  # torchvision's layer4, which makes c5


class TwoMLPHead(nn.Module):
    """Two fully connected layers with ReLU: (R, C, S, S) RoI features to (R, representation_size)."""

    def __init__(self, in_features: int, representation_size: int) -> None:
        super().__init__()
        self.fc6 = nn.Linear(in_features, representation_size)
        self.fc7 = nn.Linear(representation_size, representation_size)
        self.out_features = representation_size

    def forward(self, roi_features: Tensor) -> Tensor:
        hidden = F.relu(self.fc6(roi_features.flatten(start_dim=1)))
        return F.relu(self.fc7(hidden))


class Conv5Head(nn.Module):
    """The ResNet's stage 5 of stride 2 and an average over each channel (He et al. 2016, sec. 4.3; tables 2 and 3, a).

    (R, C4, 14, 14) RoI features to (R, C5); any other side will do.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.layer4 = make_stage(spec.arch, CONV5_STAGE, spec.batch_norm_eps, spec.body_width)
        self.out_features = spec.stage_channels[-1]

    def forward(self, roi_features: Tensor) -> Tensor:
        return self.layer4(roi_features).mean(dim=(2, 3))


class BoxPredictor(nn.Module):
    """Sibling linear layers: (R, F) to class logits (R, K + 1) and box deltas (R, 4 (K + 1)); label 0 first."""

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(in_features, num_classes)
        self.bbox_pred = nn.Linear(in_features, 4 * num_classes)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls_score(hidden), self.bbox_pred(hidden)


def make_box_head(spec: ModelSpec, representation_size: int) -> TwoMLPHead | Conv5Head:
    """The box head of a spec; ``representation_size`` is the width of two_mlp's hidden layers."""
    if spec.box_head == "conv5":
        return Conv5Head(spec)
    return TwoMLPHead(spec.feature_channels * spec.box_roi_pool.output_size**2, representation_size)

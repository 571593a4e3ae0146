"""Fast R-CNN head on pooled features (Lin et al. 2017, sec. 4.2): two hidden layers, then class and box."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class TwoMLPHead(nn.Module):
    """Two fully connected layers with ReLU: (R, C, S, S) RoI features to (R, representation_size)."""

    def __init__(self, in_features: int, representation_size: int) -> None:
        super().__init__()
        self.fc6 = nn.Linear(in_features, representation_size)
        self.fc7 = nn.Linear(representation_size, representation_size)

    def forward(self, roi_features: Tensor) -> Tensor:
        hidden = F.relu(self.fc6(roi_features.flatten(start_dim=1)))
        return F.relu(self.fc7(hidden))


class BoxPredictor(nn.Module):
    """Sibling linear layers: (R, F) to class logits (R, K + 1) and box deltas (R, 4 (K + 1)); label 0 first."""

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(in_features, num_classes)
        self.bbox_pred = nn.Linear(in_features, 4 * num_classes)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls_score(hidden), self.bbox_pred(hidden)

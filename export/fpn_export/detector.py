"""Fast and Faster R-CNN on a feature pyramid (Lin et al. 2017, sec. 4), the parts that have weights.

Submodule names are torchvision's, so that a state dict of ``fasterrcnn_resnet50_fpn`` loads as it is and
one of ours loads there. What has no weights (anchors, NMS, RoIAlign) is ``fpn_engine.pipeline``.
"""

from __future__ import annotations

from torch import Tensor, nn

from fpn_engine.backends import TrunkOutput
from fpn_engine.pipeline import PaddedDetections, Pipeline, Proposals, Thresholds
from fpn_engine.spec import ModelSpec
from fpn_export.box_head import BoxPredictor, TwoMLPHead
from fpn_export.initialization import initialize_weights
from fpn_export.pyramid import FeaturePyramid
from fpn_export.resnet import ResNet
from fpn_export.rpn_head import RPNHead

REPRESENTATION_SIZE = 1024  # width of the two hidden layers of the box head (sec. 4.2)


class Backbone(nn.Module):
    """Bottom-up network and pyramid."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.body = ResNet(spec.arch, spec.batch_norm_eps)
        self.fpn = FeaturePyramid(self.body.out_channels, spec.fpn_channels, spec.levels)

    def forward(self, images: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(N, 3, H, W) images to (c2..c5) and the pyramid's levels (p2..p6)."""
        stages = self.body(images)
        return stages, self.fpn(stages)


class FpnDetector(nn.Module):
    """What Fast and Faster R-CNN share: the backbone and the box head.

    Args:
        spec: arch, fpn_channels, levels, num_classes, box_roi_pool.output_size and batch_norm_eps are used.
        representation_size: width of the box head's two hidden layers.
    """

    def __init__(self, spec: ModelSpec, *, representation_size: int = REPRESENTATION_SIZE) -> None:
        super().__init__()
        self.spec = spec
        self.backbone = Backbone(spec)
        self.roi_heads = nn.ModuleDict(
            {
                "box_head": TwoMLPHead(spec.fpn_channels * spec.box_roi_pool.output_size**2, representation_size),
                "box_predictor": BoxPredictor(representation_size, spec.num_classes),
            }
        )

    def pyramid(self, images: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Bottom-up stages and pyramid levels.

        Args:
            images: (N, 3, H, W), normalised and padded to a multiple of 32.
        Returns: (c2..c5), each (N, C_k, H_k, W_k), and one (N, d, H_l, W_l) for each of ``spec.levels``.
        """
        return self.backbone(images)

    def trunk(self, images: Tensor) -> TrunkOutput:
        """Everything before the first selection; arguments as :meth:`pyramid`."""
        raise NotImplementedError

    @property
    def pipeline(self) -> Pipeline:
        """Everything around the weights, on the device where they are."""
        return Pipeline(self.spec, self.trunk, self.head, next(self.parameters()).device)

    def head(self, roi_features: Tensor) -> tuple[Tensor, Tensor]:
        """RoI features (R, d, S, S) to class logits (R, K + 1) and box deltas (R, 4 (K + 1))."""
        return self.roi_heads["box_predictor"](self.roi_heads["box_head"](roi_features))


class FastRCNN(FpnDetector):
    """Fast R-CNN on the pyramid with proposals given by the caller (sec. 4.2): no RPN."""

    def __init__(self, spec: ModelSpec, *, representation_size: int = REPRESENTATION_SIZE) -> None:
        super().__init__(spec, representation_size=representation_size)
        initialize_weights(self)

    def trunk(self, images: Tensor) -> TrunkOutput:
        """The pyramid's levels; ``objectness`` and ``deltas`` are empty tuples."""
        _, levels = self.pyramid(images)
        return TrunkOutput(levels, (), ())

    def forward(
        self, images: Tensor, image_sizes: Tensor, proposals: Proposals, thresholds: Thresholds | None = None
    ) -> PaddedDetections:
        """Detect among given proposals.

        Args:
            images: (N, 3, H, W), normalised and padded to a multiple of 32.
            image_sizes: (N, 2) int64, resized height and width before padding.
            proposals: boxes in pixels of the resized images; their scores are not used.
            thresholds: None takes the spec's.
        """
        return self.pipeline.classify(
            self.trunk(images), proposals, image_sizes, thresholds or Thresholds.of(self.spec)
        )


class FasterRCNN(FpnDetector):
    """Faster R-CNN on the pyramid: Fast R-CNN and a region proposal network on shared features.

    Args:
        spec: as :class:`FpnDetector`, and num_anchors.
        representation_size: width of the box head's two hidden layers.
        rpn_depth: number of 3x3 convolutions in the RPN head.
    """

    def __init__(self, spec: ModelSpec, *, representation_size: int = REPRESENTATION_SIZE, rpn_depth: int = 1) -> None:
        super().__init__(spec, representation_size=representation_size)
        self.rpn = nn.ModuleDict({"head": RPNHead(spec.fpn_channels, spec.num_anchors, rpn_depth)})
        initialize_weights(self)

    def trunk(self, images: Tensor) -> TrunkOutput:
        """The pyramid's levels and the RPN's answer on each of them, finest first."""
        _, levels = self.pyramid(images)
        objectness, deltas = zip(*(self.rpn["head"](level) for level in levels), strict=True)
        return TrunkOutput(levels, objectness, deltas)

    def forward(self, images: Tensor, image_sizes: Tensor, thresholds: Thresholds | None = None) -> PaddedDetections:
        """Detect in a preprocessed batch; arguments as :meth:`FastRCNN.forward`."""
        return self.pipeline(images, image_sizes, thresholds or Thresholds.of(self.spec))

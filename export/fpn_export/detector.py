"""Fast and Faster R-CNN and the RPN alone (Lin et al. 2017, sec. 4), the parts that have weights.

Submodule names are torchvision's, so that a state dict of ``fasterrcnn_resnet50_fpn`` loads as it is and
one of ours loads there. What has no weights (anchors, NMS, RoIAlign) is ``fpn_engine.pipeline``.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fpn_engine.backends import TrunkOutput
from fpn_engine.pipeline import PaddedDetections, Pipeline, Proposals, Thresholds
from fpn_engine.spec import ModelSpec
from fpn_export.box_head import BoxPredictor, make_box_head
from fpn_export.initialization import initialize_weights
from fpn_export.pyramid import make_pyramid
from fpn_export.resnet import ResNet
from fpn_export.rpn_head import answer_levels, make_rpn_head

REPRESENTATION_SIZE = 1024  # width of the two hidden layers of the box head (sec. 4.2)


class Backbone(nn.Module):
    """Bottom-up network and pyramid."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.body = ResNet(spec.arch, spec.batch_norm_eps, spec.body_width, spec.coarsest_stage)
        self.fpn = make_pyramid(spec)

    def forward(self, images: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(N, 3, H, W) images to the stages (c2..c5) and the levels (p2..p6)."""
        stages = self.body(images)
        return stages, self.fpn(stages)


class FpnDetector(nn.Module):
    """What all systems share: the backbone; and what those with an RPN or a box head share: these.

    Args:
        spec: all that concerns the network: model, arch, body_width, pyramid, fpn_channels, levels, box_head,
            num_classes, num_anchors, rpn_head_shared, box_roi_pool.output_size and batch_norm_eps.
        representation_size: width of a two_mlp box head's two hidden layers.
        rpn_depth: number of 3x3 convolutions in each RPN head.
    """

    has_rpn = True
    has_box_head = True

    def __init__(self, spec: ModelSpec, *, representation_size: int = REPRESENTATION_SIZE, rpn_depth: int = 1) -> None:
        super().__init__()
        self.spec = spec
        self.backbone = Backbone(spec)
        if self.has_box_head:
            box_head = make_box_head(spec, representation_size)
            predictor = BoxPredictor(box_head.out_features, spec.num_classes)
            self.roi_heads = nn.ModuleDict({"box_head": box_head, "box_predictor": predictor})
        if self.has_rpn:
            self.rpn = nn.ModuleDict({"head": make_rpn_head(spec, rpn_depth)})
        initialize_weights(self)

    def pyramid(self, images: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Bottom-up stages and the levels made of them.

        Args:
            images: (N, 3, H, W), normalised and padded to a multiple of 32.
        Returns: c2.. up to ``spec.coarsest_stage``, each (N, C_k, H_k, W_k), and one (N, d, H_l, W_l) for each of
            ``spec.levels``.
        """
        return self.backbone(images)

    def trunk(self, images: Tensor) -> TrunkOutput:
        """Everything before the first selection: the levels and the RPN's answer on each of them, finest first.

        Arguments as :meth:`pyramid`. Without an RPN ``objectness`` and ``deltas`` are empty tuples.
        """
        _, levels = self.pyramid(images)
        return TrunkOutput(levels, *self.answer(levels))

    def answer(self, levels: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The RPN's objectness and deltas on each level; empty without an RPN."""
        return answer_levels(self.rpn["head"], levels) if self.has_rpn else ((), ())

    @property
    def pipeline(self) -> Pipeline:
        """Everything around the weights, on the device where they are."""
        head = self.head if self.has_box_head else None
        return Pipeline(self.spec, self.trunk, head, next(self.parameters()).device)

    def head(self, roi_features: Tensor) -> tuple[Tensor, Tensor]:
        """RoI features (R, d, S, S) to class logits (R, K + 1) and box deltas (R, 4 (K + 1))."""
        return self.roi_heads["box_predictor"](self.roi_heads["box_head"](roi_features))

    def forward(self, images: Tensor, image_sizes: Tensor, thresholds: Thresholds | None = None) -> PaddedDetections:
        """Detect in a preprocessed batch.

        Args:
            images: (N, 3, H, W), normalised and padded to a multiple of 32.
            image_sizes: (N, 2) int64, resized height and width before padding.
            thresholds: None takes the spec's.
        """
        return self.pipeline(images, image_sizes, thresholds or Thresholds.of(self.spec))


class FasterRCNN(FpnDetector):
    """Faster R-CNN: Fast R-CNN and a region proposal network on shared features (sec. 4)."""


class RegionProposalNetwork(FpnDetector):
    """The RPN alone (sec. 4.1), without a box head: its proposals are detections of one category."""

    has_box_head = False


class FastRCNN(FpnDetector):
    """Fast R-CNN with proposals given by the caller (sec. 4.2): no RPN."""

    has_rpn = False

    def forward(  # type: ignore[override]  # it cannot detect without proposals
        self, images: Tensor, image_sizes: Tensor, proposals: Proposals, thresholds: Thresholds | None = None
    ) -> PaddedDetections:
        """Detect among given proposals.

        Args: as :meth:`FpnDetector.forward`. proposals: boxes in pixels of the resized images; their scores are not
            used.
        """
        return self.pipeline.classify(
            self.trunk(images), proposals, image_sizes, thresholds or Thresholds.of(self.spec)
        )


DETECTORS: dict[str, type[FpnDetector]] = {
    "faster_rcnn": FasterRCNN,
    "fast_rcnn": FastRCNN,
    "rpn": RegionProposalNetwork,
}


def make_detector(
    spec: ModelSpec, *, representation_size: int = REPRESENTATION_SIZE, rpn_depth: int = 1
) -> FpnDetector:
    """The detector of a spec with initial weights; arguments as :class:`FpnDetector`."""
    return DETECTORS[spec.model](spec, representation_size=representation_size, rpn_depth=rpn_depth)

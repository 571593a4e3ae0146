"""Initial weights of a detector that is to be trained."""

from __future__ import annotations

from functools import partial

from torch import nn

# He et al. 2015 for what ReLU follows in the ResNet; Xavier-like uniform (a = 1) for the pyramid and the
# hidden layers, as Detectron; Gaussians for the RPN and the predictors (Girshick 2015, sec. 3.1).
_HE = partial(nn.init.kaiming_normal_, mode="fan_out", nonlinearity="relu")
_XAVIER = partial(nn.init.kaiming_uniform_, a=1)
RULES = {
    "backbone.body": _HE,
    "backbone.fpn": _XAVIER,
    "rpn.head": partial(nn.init.normal_, std=0.01),
    "roi_heads.box_head.fc": _XAVIER,
    "roi_heads.box_head.layer4": _HE,
    "roi_heads.box_predictor.cls_score": partial(nn.init.normal_, std=0.01),
    "roi_heads.box_predictor.bbox_pred": partial(nn.init.normal_, std=0.001),
}


def initialize_weights(detector: nn.Module) -> None:
    """Draw every convolution and linear layer of ``detector`` anew, in place; biases become 0.

    Batch norms are left as constructed: weight 1, bias 0, mean 0, variance 1.
    """
    for prefix, draw in RULES.items():
        for name, module in detector.named_modules():
            if name.startswith(prefix) and isinstance(module, nn.Conv2d | nn.Linear):
                draw(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

"""Augmentation: flips, brightness and scale, drawn anew each time an image is seen."""

from __future__ import annotations

import math

import numpy as np
from numpy.random import RandomState

from fpn_engine.proposals import Boxes
from fpn_export.training.examples import Example
from fpn_export.training.recipe import Recipe


def augment(example: Example, recipe: Recipe, random: RandomState) -> tuple[Example, float]:
    """Flip and brighten; returns also the factor on the model's min_size and max_size.

    Every number is drawn whether it is used or not, so that one option does not change another's draws.
    """
    flip, brightness, scale = random.uniform(size=3)
    pixels, boxes, proposals = example.pixels, example.boxes, example.proposals
    if flip < recipe.flip:
        width = pixels.shape[1]
        pixels = pixels[:, ::-1]
        boxes = _flip(boxes, width)
        proposals = None if proposals is None else _flip(proposals, width)
    if recipe.brightness:
        factor = 1 + recipe.brightness * (2 * brightness - 1)
        table = np.minimum(np.arange(256) * factor + 0.5, 255).astype(np.uint8)
        pixels = table[pixels]
    low, high = (math.log(scale_) for scale_ in recipe.scales)
    return Example(np.ascontiguousarray(pixels), boxes, example.labels, proposals), math.exp(low + scale * (high - low))


def _flip(boxes: Boxes, width: int) -> Boxes:
    return np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)

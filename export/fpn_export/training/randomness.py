"""Random numbers that depend on the seed and the place in a run only, so that a resumed run draws the same."""

from __future__ import annotations

import numpy as np
import torch
from numpy.random import RandomState

# What the numbers are for: streams of one seed do not meet.
ORDER, AUGMENTATION, SAMPLING, INITIAL_WEIGHTS = range(4)


def random_state(seed: int, purpose: int, *place: int) -> RandomState:
    """NumPy random numbers; its legacy stream is the same in every version."""
    return RandomState([seed, purpose, *place])


def torch_generator(device: torch.device, seed: int, purpose: int, *place: int) -> torch.Generator:
    """A generator on ``device``."""
    number = random_state(seed, purpose, *place).randint(2**63, dtype=np.int64)
    return torch.Generator(device).manual_seed(int(number))

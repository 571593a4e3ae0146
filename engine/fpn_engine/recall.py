"""Average recall, counted image by image: all matches of a data set at once would take gigabytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

AREAS, IOUS = 4, 10  # of COCOeval: all, small, medium, large; 0.50:0.05:0.95


class RecallCounter:
    """Recall at each of ``limits`` proposals per image, from the matches of ``COCOeval``."""

    def __init__(self, limits: Sequence[int]) -> None:
        self._limits = limits
        self._found: NDArray[np.int64] = np.zeros((AREAS, len(limits), IOUS), np.int64)
        self._annotated: NDArray[np.int64] = np.zeros((AREAS, 1, 1), np.int64)

    def add(self, matches: Iterable[Mapping[str, Any] | None]) -> None:
        """``evalImgs`` of one image and one class: a match for each area."""
        for area, match in enumerate(matches):
            if match is None:  # neither objects nor proposals
                continue
            self._annotated[area] += np.count_nonzero(match["gtIgnore"] == 0)
            hits = (match["dtMatches"] != 0) & ~match["dtIgnore"].astype(bool)  # (IoU, proposal), best first
            self._found[area] += [hits[:, :limit].sum(axis=1) for limit in self._limits]

    def average(self) -> NDArray[np.float64]:
        """(4, limits), mean over IoU; NaN where nothing is annotated."""
        with np.errstate(invalid="ignore"):
            average: NDArray[np.float64] = (self._found / self._annotated).mean(axis=2)
        return average

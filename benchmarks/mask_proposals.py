"""Mask proposals: at the winners alone against the fully convolutional evaluation, in one process, interleaved.

    python -m benchmarks.mask_proposals [--arch resnet50] [--variant dual] [--rounds 5]

checks that both give the same masks and prints seconds and ratios, of wall time and of processor time, whole and
without bottom-up network and pyramid. Fresh weights: the work does not depend on what they are.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fpn_engine.masks.pipeline import MaskTrunkOutput, PaddedMasks, select_winners
from fpn_engine.masks.regions import Regions
from fpn_engine.masks.spec import MaskSpec
from fpn_export.batch_norm import fold_batch_norm
from fpn_export.masks.model import FpnMasks
from fpn_export.masks.variants import VARIANTS, make_variant

SIZE = (800, 1216)


def evaluate_densely(model: FpnMasks, levels: tuple[Tensor, ...]) -> PaddedMasks:
    """Scores and masks everywhere, then the best: what a fully convolutional model does by itself."""
    answers = [[head(level) for head in model.mask_heads] for level in levels]
    scores = [torch.cat([score for score, _ in answer], dim=1) for answer in answers]
    winners = select_winners(scores, model.spec.masks_per_img)
    masks = torch.stack(
        [
            answers[level][head][1][image, :, y, x]
            for (image, level, y, x), head in zip(
                winners.places.flatten(0, 1).tolist(), winners.heads.flatten().tolist(), strict=True
            )
        ]
    )
    _, level, y, x = winners.places.unbind(dim=2)
    regions = Regions(model.spec).cover(level, winners.heads, y, x)
    size = model.spec.mask_size
    return PaddedMasks(regions, winners.logits.sigmoid(), masks.view(1, -1, size, size), torch.zeros(1))


@torch.no_grad()
def measure(arch: str, variant: str, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = fold_batch_norm(FpnMasks(make_variant(MaskSpec(arch=arch), variant)))
    image = torch.randn(1, 3, *SIZE)
    levels = model.pyramid(image)

    def answer_sparsely(levels: tuple[Tensor, ...]) -> PaddedMasks:
        return model.pipeline.propose(MaskTrunkOutput(levels, model.score(levels)))

    contestants: dict[str, Callable[[], Any]] = {
        "sparse": lambda: answer_sparsely(model.pyramid(image)),
        "dense": lambda: evaluate_densely(model, model.pyramid(image)),
        "sparse heads": lambda: answer_sparsely(levels),
        "dense heads": lambda: evaluate_densely(model, levels),
        "masks of the winners": lambda: model.pipeline.propose(out),
    }
    out = MaskTrunkOutput(levels, model.score(levels))
    ours, theirs = contestants["sparse heads"](), contestants["dense heads"]()
    torch.testing.assert_close(ours.masks, theirs.masks, rtol=0, atol=1e-4)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            taken[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    seconds = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in taken.items()}
    return {
        "arch": arch,
        "variant": variant,
        "size": SIZE,
        "threads": torch.get_num_threads(),
        "wall s": {name: round(wall, 3) for name, (wall, _) in seconds.items()},
        "processor s": {name: round(cpu, 3) for name, (_, cpu) in seconds.items()},
        "sparse / dense": [round(s / d, 3) for s, d in zip(seconds["sparse"], seconds["dense"], strict=True)],
        "heads alone": [round(s / d, 3) for s, d in zip(seconds["sparse heads"], seconds["dense heads"], strict=True)],
        "largest difference": (ours.masks - theirs.masks).abs().max().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mask_proposals", description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--variant", default="dual", choices=VARIANTS)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    print(json.dumps(measure(given.arch, given.variant, given.rounds), indent=1))


if __name__ == "__main__":
    main()

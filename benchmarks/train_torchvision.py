"""torchvision's own Faster R-CNN R18-FPN, trained by torchvision's code on the data of ``fpn-engine train``.

    python -m benchmarks.train_torchvision --annotations X.json --images DIR -o FOLDER --minutes 600

The yardstick for the bundled model: the same images with the same flips, and as many updates as fit into the minutes,
which are those of one core (of the clock on a GPU). The learning rate stays, but for the last of them, ``--decay``,
in which it falls to nothing. Leaves FOLDER/last.pth with its JSON, which ``fpn-engine export`` takes. The same command
goes on where it was stopped, and one with more minutes, or with larger images, from where the rate began to fall.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.models import resnet18
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

from fpn_engine.annotations import load_annotations
from fpn_engine.files import replacing
from fpn_engine.spec import ModelSpec
from fpn_export.training.augmentation import augment
from fpn_export.training.batches import BatchOrder, Place
from fpn_export.training.examples import AnnotatedExamples, Examples, JoinedExamples
from fpn_export.training.randomness import AUGMENTATION, random_state
from fpn_export.training.recipe import Recipe

CHANNELS, REPRESENTATION = 128, 256
SCALES = (0.7, 0.8, 0.9, 1.0, 1.1)
WARMUP = 200
ENDLESS = 10**9


class Augmented:
    """Images and targets as torchvision's detectors take them."""

    def __init__(self, examples: Examples, recipe: Recipe) -> None:
        self._examples, self._recipe = examples, recipe

    def __getitem__(self, place: Place) -> tuple[Tensor, dict[str, Tensor]]:
        random = random_state(self._recipe.seed, AUGMENTATION, place.step, place.slot)
        example, _ = augment(self._examples[place.image], self._recipe, random)
        image = torch.from_numpy(example.pixels).permute(2, 0, 1).float() / 255
        return image, {"boxes": torch.from_numpy(example.boxes), "labels": torch.from_numpy(example.labels)}


def make_model(spec: ModelSpec, scales: tuple[float, ...]) -> FasterRCNN:
    """Random weights, trainable batch norms; boxes and losses in float32, also where the layers compute in bfloat16.

    torchvision casts proposals and ground truth to the type of the predicted offsets. In bfloat16, whose steps are 4
    pixels from 512 on, a small object's box would have no width, and the loss would not be a number.
    """
    body = resnet18(weights=None)
    stages = {f"layer{i + 1}": str(i) for i in range(4)}
    sizes = tuple(tuple(int(side) for side in level) for level in spec.anchor_sizes)
    model = FasterRCNN(
        BackboneWithFPN(body, stages, [64, 128, 256, 512], CHANNELS),
        min_size=tuple(round(spec.min_size * scale) for scale in scales),
        max_size=round(spec.max_size * max(scales)),
        rpn_anchor_generator=AnchorGenerator(sizes, (spec.aspect_ratios,) * len(sizes)),
        box_head=TwoMLPHead(CHANNELS * 49, REPRESENTATION),
        box_predictor=FastRCNNPredictor(REPRESENTATION, spec.num_classes),
    )
    model.rpn.head.register_forward_hook(lambda _, __, levels: tuple([at.float() for at in kind] for kind in levels))
    model.roi_heads.box_predictor.register_forward_hook(lambda _, __, kinds: tuple(kind.float() for kind in kinds))
    return model


@dataclass(frozen=True)
class Budget:
    """Minutes of training: ``decay`` of them, the last, are those in which the learning rate falls."""

    minutes: float
    decay: float

    def share(self, seconds: float) -> float:
        """Of the full learning rate, after seconds of training."""
        falling = 60 * self.minutes * self.decay
        return min(1.0, max(0.0, 60 * self.minutes - seconds) / falling) if falling else 1.0


class Save:
    """Where a run can be taken up: with any budget at a full learning rate, with the same one while it falls."""

    def __init__(self, folder: Path, budget: Budget) -> None:
        self._steady, self._falling = folder / "state.pt", folder / "falling.pt"
        self._budget = budget

    def load(self, device: torch.device) -> dict[str, Any] | None:
        for path in (self._falling, self._steady):
            if path.exists():
                state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
                if path == self._steady or state["budget"] == asdict(self._budget):
                    return state
        return None

    def store(self, state: dict[str, Any]) -> None:
        steady = self._budget.share(state["seconds"]) == 1
        with replacing(self._steady if steady else self._falling) as temporary:
            torch.save({**state, "budget": asdict(self._budget)}, temporary)


def train(
    spec: ModelSpec, examples: Examples, folder: Path, budget: Budget, rate: float, batch: int, workers: int
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    torch.manual_seed(0)
    model = make_model(spec, SCALES).train().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4, nesterov=True)
    save = Save(folder, budget)
    step, seconds = 0, 0.0
    reached: dict[str, dict[str, float]] = {}
    if state := save.load(device):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds, reached = state["step"], state["seconds"], state["reached"]
    recipe = Recipe(steps=ENDLESS, batch_size=batch, brightness=0.2)
    order = BatchOrder(examples.shapes, recipe, first_step=step)
    loader = DataLoader(Augmented(examples, recipe), batch_sampler=order, collate_fn=transpose, num_workers=workers)
    began = clock()
    for images, targets in loader:
        for group in optimizer.param_groups:
            group["lr"] = rate * budget.share(seconds) * min(1.0, (step + 1) / WARMUP)
        images = [image.to(device, non_blocking=True) for image in images]
        targets = [{name: value.to(device) for name, value in target.items()} for target in targets]
        with torch.autocast(device.type, dtype=torch.bfloat16):
            losses = model(images, targets)
        loss = torch.stack([part.float() for part in losses.values()]).sum()
        if not torch.isfinite(loss):
            raise SystemExit(f"update {step + 1}: the loss is {loss.item()}; nothing of it was saved")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        step += 1
        now = clock()
        seconds, began = seconds + now - began, now
        done = seconds >= 60 * budget.minutes
        if step % 50 == 0 or done:
            print(f"step {step}: loss {loss.item():.3f}, {seconds / 60:.1f} of {budget.minutes} min", flush=True)
            reached[f"{spec.min_size}/{spec.max_size}"] = {"steps": step, "minutes": round(seconds / 60, 1)}
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            save.store({**state, "seconds": seconds, "reached": reached})
        if done:
            break
    torch.save(model.state_dict(), folder / "last.pth")
    about = {
        "trained_with": "torchvision's FasterRCNN",
        "steps": step,
        "batch": batch,
        "minutes": round(seconds / 60, 1),
        "minutes_of": "the clock" if device.type == "cuda" else "one core",
        "decay": budget.decay,
        "reached": reached,
    }
    values = {**spec.to_dict(), "fpn_channels": CHANNELS}
    (folder / "last.json").write_text(json.dumps({"spec": values, "about": about}, indent=1) + "\n")


def transpose(drawn: list[tuple[Tensor, dict[str, Tensor]]]) -> tuple[tuple[Any, ...], ...]:
    """Images and targets of a batch."""
    return tuple(zip(*drawn, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", type=Path, required=True, action="append", help="may be given several times")
    parser.add_argument("--images", type=Path, required=True, action="append", help="one for each --annotations")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--decay", type=float, default=0.2, help="share of the minutes (default: 0.2)")
    parser.add_argument("--learning-rate", type=float, default=0.02)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--workers", type=int, default=0, help="processes that read images ahead")
    parser.add_argument("--min-size", type=int, default=480)
    parser.add_argument("--max-size", type=int, default=640)
    given = parser.parse_args()
    truths = [load_annotations(path) for path in given.annotations]
    spec = ModelSpec(
        categories=truths[0].categories,
        arch="resnet18",
        fpn_channels=CHANNELS,
        min_size=given.min_size,
        max_size=given.max_size,
        anchor_sizes=((16.0,), (32.0,), (64.0,), (128.0,), (256.0,)),
    )
    parts = [AnnotatedExamples(*of, spec.categories) for of in zip(truths, given.images, strict=True)]
    budget = Budget(given.minutes, given.decay)
    train(spec, JoinedExamples(parts), given.output, budget, given.learning_rate, given.batch, given.workers)


if __name__ == "__main__":
    main()

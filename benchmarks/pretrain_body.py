"""A classifier of shapes, for the bundled model's bottom-up network to start from.

    python -m benchmarks.pretrain_body --annotations X.json --images DIR -o FOLDER --steps 5000

What ImageNet is to the paper (Lin et al. 2017, sec. 5), objects cut out of the training scenes are here: each in a
square of random context and place, resized to 64 pixels, and one in eight without an object. Leaves
FOLDER/classifier.pth, which ``fpn-engine train --init`` takes. The same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import RandomState
from PIL import Image
from torch import Tensor, nn

from fpn_engine.annotations import load_annotations
from fpn_engine.spec import ModelSpec
from fpn_export.resnet import ResNet
from fpn_export.training.examples import AnnotatedExamples
from fpn_export.training.recipe import Recipe

SIDE, BATCH, BACKGROUND = 64, 128, 0.125
CONTEXT = (1.05, 2.2)  # side of the square over the longer side of the object
OVERLAP = 0.2  # most of a square without an object that any object covers


class Classifier(nn.Module):
    """A bottom-up network, global average pooling and a linear layer named ``fc``."""

    def __init__(self, body: ResNet, classes: int) -> None:
        super().__init__()
        self.body = body
        self.fc = nn.Linear(body.out_channels[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.body(images)[-1].mean(dim=(2, 3)))

    def flat_state(self) -> dict[str, Tensor]:
        """Named as torchvision's ResNet."""
        return {name.removeprefix("body."): tensor for name, tensor in self.state_dict().items()}


def draw(examples: AnnotatedExamples, cached: dict[int, np.ndarray], random: RandomState) -> tuple[np.ndarray, int]:
    """One square of 64x64 pixels and its label, 0 for none."""
    while True:
        index = random.randint(len(examples))
        if index not in cached:
            cached[index] = examples[index].pixels
        pixels, (boxes, labels) = cached[index], examples.objects_of(index)
        height, width = pixels.shape[:2]
        if random.uniform() < BACKGROUND:
            side = np.exp(random.uniform(np.log(12), np.log(200)))
            x, y = random.uniform(0, width - side), random.uniform(0, height - side)
            square, label = (x, y, x + side, y + side), 0
            inner = np.minimum(boxes[:, 2:], square[2:]) - np.maximum(boxes[:, :2], square[:2])
            if (inner.clip(min=0).prod(axis=1) > OVERLAP * (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)).any():
                continue
        else:
            chosen = random.randint(len(boxes))
            x1, y1, x2, y2 = boxes[chosen]
            side = max(x2 - x1, y2 - y1) * random.uniform(*CONTEXT)
            room = (side - (x2 - x1), side - (y2 - y1))
            x, y = x1 - room[0] * random.uniform(0.2, 0.8), y1 - room[1] * random.uniform(0.2, 0.8)
            square, label = (x, y, x + side, y + side), int(labels[chosen])
        cut = Image.fromarray(pixels).transform(
            (SIDE * 2, SIDE * 2), Image.Transform.EXTENT, square, resample=Image.Resampling.BILINEAR
        )
        small = np.asarray(cut.reduce(2))
        return (small[:, ::-1] if random.uniform() < 0.5 else small), label


def draw_batch(
    examples: AnnotatedExamples, cached: dict[int, np.ndarray], seed: int, step: int
) -> tuple[Tensor, Tensor]:
    random = RandomState([seed, step])
    squares, labels = zip(*(draw(examples, cached, random) for _ in range(BATCH)), strict=True)
    return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).float() / 255, torch.tensor(labels)


def train(spec: ModelSpec, examples: AnnotatedExamples, folder: Path, steps: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = Classifier(ResNet(spec.arch, spec.batch_norm_eps, spec.body_width), spec.num_classes).train()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    recipe = Recipe(steps=steps, learning_rate=0.1, schedule="cosine", warmup_steps=200)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)
    state_path, step, seconds = folder / "state.pt", 0, 0.0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds = state["step"], state["seconds"]
    mean, std = (torch.tensor(v)[:, None, None] for v in (spec.image_mean, spec.image_std))
    cached: dict[int, np.ndarray] = {}
    recent: list[float] = []
    while step < steps:
        began = time.perf_counter()
        images, labels = draw_batch(examples, cached, 1, step)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate_at(step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model((images - mean) / std)
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        seconds += time.perf_counter() - began
        recent.append((logits.argmax(dim=1) == labels).float().mean().item())
        if step % 100 == 0 or step == steps:
            print(f"step {step}: right {np.mean(recent):.3f}, {seconds / 60:.1f} min", flush=True)
            recent.clear()
            temporary = state_path.with_suffix(".tmp")
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save({**state, "seconds": seconds}, temporary)
            os.replace(temporary, state_path)
    torch.save(model.flat_state(), folder / "classifier.pth")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--body-width", type=int, default=32)
    given = parser.parse_args()
    truth = load_annotations(given.annotations)
    spec = ModelSpec(categories=truth.categories, arch="resnet18", body_width=given.body_width)
    train(spec, AnnotatedExamples(truth, given.images, spec.categories), given.output, given.steps)


if __name__ == "__main__":
    main()

"""The demonstration itself: generate, detect, compare, and write it all down."""

from __future__ import annotations

import statistics
import time
from typing import NamedTuple

from PIL import Image

from fpn_engine.drawing import draw_detections
from fpn_engine.engine import Engine
from fpn_export.demo.comparison import Comparison, compare
from fpn_export.demo.folder import DemoFolder
from fpn_export.demo.page import Run, write_page
from fpn_export.scenes import make_scene

# The scenes shown are of this data set, which nothing is trained on. Scene 0 has every class, from 6 to 255 pixels.
DATA_SET = 20_170_419
SHOWN_SCORE = 0.5
ROUNDS = 3  # detections that are timed, after one to warm up


class Demonstration(NamedTuple):
    """What was found beside what is there, and the seconds that one detection took."""

    comparison: Comparison
    seconds: float


def demonstrate(engine: Engine, runtime: str, seed: int, folder: DemoFolder) -> Demonstration:
    """Detect in scene number ``seed`` and write it, the picture with boxes and the page into ``folder``.

    Args: runtime: how the engine runs, for people.
    Raises: FpnEngineError if that cannot be written, or for a network that gives NaN or infinity.
    """
    scene = make_scene(DATA_SET, seed)
    folder.save_scene(Image.fromarray(scene.image))
    (detections,) = engine(scene.image)
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        engine(scene.image)
        rounds.append(time.perf_counter() - start)
    seconds = statistics.median(rounds)

    shown = detections.filter(min_score=SHOWN_SCORE)
    comparison = compare(scene, shown)
    picture = draw_detections(scene.image, shown)
    folder.save_picture(picture)
    run = Run(seed=seed, seconds=seconds, runtime=runtime, categories=engine.spec.categories)
    folder.save_page(write_page(picture, comparison, run, folder.scene))
    return Demonstration(comparison, seconds)

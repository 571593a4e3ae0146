"""COCO's categories as torchvision's detectors number them: label = category id, 1 to 90.

Ten of these ids were never used by the published annotations (Lin et al. 2014); they are named "N/A".
"""

from __future__ import annotations

from fpn_engine.spec import Category

_NAMES = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light,
fire hydrant, N/A, stop sign, parking meter, bench, bird, cat, dog, horse, sheep,
cow, elephant, bear, zebra, giraffe, N/A, backpack, umbrella, N/A, N/A,
handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove,
skateboard, surfboard, tennis racket, bottle, N/A, wine glass, cup, fork, knife, spoon,
bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut,
cake, chair, couch, potted plant, bed, N/A, dining table, N/A, N/A, toilet,
N/A, tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster,
sink, refrigerator, N/A, book, clock, vase, scissors, teddy bear, hair drier, toothbrush
"""

COCO_CATEGORIES = tuple(
    Category(id=i, name=name.strip()) for i, name in enumerate(_NAMES.replace("\n", " ").split(","), start=1)
)

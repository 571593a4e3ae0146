"""Label assignment against appendix A of Lin et al. 2017, written out word for word."""

import itertools
import math

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from fpn_engine.masks.regions import Regions
from fpn_export.masks.targets import assign_examples, assign_sizes, list_locations, match_locations
from fpn_export.masks.variants import VARIANTS, make_variant
from fpn_export.scenes.scene import make_scene
from fpn_export.training.matching import BACKGROUND
from tests.export.masks.tiny import tiny_spec

GRIDS = ((24, 32), (12, 16), (6, 8), (3, 4), (2, 2))


def transcribe(spec, grids, boxes):
    """{(level k, y, x, kernel): object} of all positives, in Python's own floats."""
    # "Masks with scales of {32, 64, 128, 256, 512} map to {P2, P3, P4, P5, P6} and are handled by a 5x5 MLP";
    # "a second slightly larger MLP of size 7x7 to handle half-octaves"
    sizes = {
        (k, head.kernel): 32 * 2 ** (k - 2) * (math.sqrt(2) if head.kernel == 7 else 1)
        for k in spec.levels
        for head in spec.heads
    }
    mapped = []
    for x1, y1, x2, y2 in boxes:
        scale = max(x2 - x1, y2 - y1)  # "we define the scale of a mask as the max of its width and height"
        # "Objects at intermediate scales are mapped to the nearest scale in log space"; half-way, to the larger
        mapped.append(min(sizes, key=lambda at: (round(abs(math.log2(scale / sizes[at])), 6), -sizes[at])))
    learned = {}
    for k, (height, width) in zip(spec.levels, grids, strict=True):
        for y, x, head in itertools.product(range(height), range(width), spec.heads):
            best = None
            for number, (x1, y1, x2, y2) in enumerate(boxes):
                # "the mask whose center falls within 2^k pixels of that location (+-1 cell offset)"
                dx, dy = (x1 + x2) / 2 - x * 2**k, (y1 + y2) / 2 - y * 2**k
                near = abs(dx) <= 2**k and abs(dy) <= 2**k
                if mapped[number] == (k, head.kernel) and near and (best is None or dx**2 + dy**2 < best[0]):
                    best = (dx**2 + dy**2, number)
            if best:
                learned[k, y, x, head.kernel] = best[1]
    return learned


def match(spec, grids, boxes):
    regions, locations = Regions(spec), list_locations(grids, len(spec.heads))
    matched = match_locations(regions, locations, torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    rows = zip(*(column.tolist() for column in (*locations, matched)), strict=True)
    return {
        (spec.levels[level], y, x, spec.heads[head].kernel): number
        for level, head, y, x, number in rows
        if number != BACKGROUND
    }


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("index", range(3))
def test_equals_appendix_a_on_scenes(index, variant):
    spec = make_variant(tiny_spec(), variant)
    boxes = make_scene(5, index, (96, 128)).boxes.tolist()
    assert len(boxes) > 2
    expected = transcribe(spec, GRIDS, boxes)
    assert expected
    assert match(spec, GRIDS, boxes) == expected


SIDES = st.one_of(st.integers(1, 600), st.sampled_from([16.0, 32.0, 38.0, 53.8, 64.0, 128.0, 512.0]))


@settings(deadline=None, max_examples=25, phases=(Phase.explicit, Phase.generate))
@given(
    st.lists(st.tuples(st.integers(-40, 260), st.integers(-40, 200), SIDES, SIDES), max_size=6),
    st.sampled_from(list(VARIANTS)),
)
def test_equals_appendix_a_on_random_boxes(rows, variant):
    boxes = [(cx / 2 - w / 2, cy / 2 - h / 2, cx / 2 + w / 2, cy / 2 + h / 2) for cx, cy, w, h in rows]
    spec = make_variant(tiny_spec(), variant)
    assert match(spec, GRIDS, boxes) == transcribe(spec, GRIDS, boxes)


def test_one_object_by_hand():
    """64 pixels wide: the 5x5 head of P3, whose cells are 8 pixels; centre (40, 36)."""
    matched = match(tiny_spec(), GRIDS, [(8, 20, 72, 52)])
    assert matched == {(3, y, x, 5): 0 for y in (4, 5) for x in (4, 5, 6)}


def test_half_octaves_go_to_the_second_head():
    regions = Regions(tiny_spec())
    scales = [1, 32, 38, 38.1, 45.25, 53.8, 53.9, 64, 128 * 2**0.5, 600, 724, 5000]
    boxes = torch.tensor([[0, 0, s, s / 3] for s in scales])
    levels, heads = assign_sizes(regions, boxes)
    assert levels.tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 2, 4, 4, 4]
    assert heads.tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 1, 0, 1, 1]


def test_every_object_can_be_learned():
    """A centre anywhere has locations within 2^k, unless it is beyond the last of the level."""
    spec = tiny_spec()
    for cx, cy in [(0.0, 0.0), (3.9, 77.7), (64.0, 48.0), (100.1, 50.3)]:
        for size in (20, 45, 90, 200):
            assert match(spec, GRIDS, [(cx - size / 2, cy - size / 2, cx + size / 2, cy + size / 2)])


def test_samples_are_a_quarter_positive():
    spec = tiny_spec()
    regions = Regions(spec)
    many = torch.tensor([[8.0 * i, 8.0 * i, 8.0 * i + 30, 8.0 * i + 30] for i in range(10)])
    generator = torch.Generator().manual_seed(0)
    found = assign_examples(regions, GRIDS, [many, many[:1], many[:0]], 128, generator)
    counts = [(found.objects[found.places[:, 0] == i] >= 0).sum().item() for i in range(3)]
    assert counts == [32, len(match(spec, GRIDS, many[:1].tolist())), 0]
    assert found.places[:, 0].bincount().tolist() == [128] * 3
    assert len(torch.unique(torch.cat([found.places, found.heads[:, None]], dim=1), dim=0)) == 3 * 128
    again = assign_examples(regions, GRIDS, [many, many[:1], many[:0]], 128, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    everything = match(spec, GRIDS, many.tolist())
    for (image, level, y, x), head, number in zip(*(part.tolist() for part in found), strict=True):
        if image == 0:
            assert everything.get((spec.levels[level], y, x, spec.heads[head].kernel), BACKGROUND) == number

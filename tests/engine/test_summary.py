import numpy as np
from rich.console import Console

from fpn_engine.detections import Detections
from fpn_engine.spec import Category
from fpn_engine.summary import MAX_CLASS_COLUMNS, summary_table

NAMES = ("cell", "[bold]x[/bold]", *(f"rare {i}" for i in range(MAX_CLASS_COLUMNS)))


def make_detections(source: str | None, labels: list[int]) -> Detections:
    return Detections(
        boxes=np.tile(np.array([1.25, 2, 30, 400], np.float32), (len(labels), 1)),
        scores=np.linspace(0.98, 0.5, len(labels), dtype=np.float32),
        labels=np.array(labels, np.int64),
        image_size=(480, 640),
        categories=tuple(Category(id=i, name=name) for i, name in enumerate(NAMES, start=1)),
        source=source,
    )


def render(*images: Detections) -> list[list[str]]:
    """The words of each line, without the frame."""
    console = Console(width=200)
    with console.capture() as capture:
        console.print(summary_table(images))
    lines = [
        [cell.strip() for cell in line.strip("│┃ ").replace("┃", "│").split("│")] for line in capture.get().splitlines()
    ]
    return [line for line in lines if any(character.isalnum() for cell in line for character in cell)]


def test_one_image_shows_each_detection() -> None:
    assert render(make_detections("a[b]\n.jpg", [1, 2])) == [
        [r"a[b]\n.jpg"],
        ["class", "score", "x1", "y1", "x2", "y2"],
        ["cell", "0.98", "1.2", "2.0", "30.0", "400.0"],
        ["[bold]x[/bold]", "0.50", "1.2", "2.0", "30.0", "400.0"],
    ]


def test_one_image_without_name_or_detections() -> None:
    assert render(make_detections(None, []))[-1][0] == "nothing found"


def test_several_images_show_counts_with_the_most_common_class_first() -> None:
    assert render(make_detections("a.jpg", [1, 2, 2]), make_detections("b.jpg", []), make_detections("c.jpg", [2])) == [
        ["image", "[bold]x[/bold]", "cell", "all"],
        ["a.jpg", "2", "1", "3"],
        ["b.jpg", "", "", "0"],
        ["c.jpg", "1", "", "1"],
        ["3 images", "3", "1", "4"],
    ]


def test_rare_classes_share_a_column() -> None:
    everything = list(range(1, len(NAMES) + 1))
    header, first, *_ = render(make_detections("a.jpg", everything), make_detections("b.jpg", [1, 1]))
    assert header[0:2] == ["image", "cell"]
    assert header[-2:] == ["other", "all"]
    assert first[-2:] == ["2", str(len(NAMES))]


def test_no_images_at_all() -> None:
    assert render() == [["image", "all"], ["0 images", "0"]]

"""Generated scenes with boxes and masks, to train and to show things on where no photographs are at hand."""

from fpn_export.scenes.dataset import CATEGORIES, SceneDataset, write_coco
from fpn_export.scenes.scene import NAMES, SIZE, Scene, make_scene

__all__ = ["CATEGORIES", "NAMES", "SIZE", "Scene", "SceneDataset", "make_scene", "write_coco"]

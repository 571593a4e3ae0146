"""The demonstration: a generated scene, what the bundled model finds in it, and a page that shows both."""

from fpn_export.demo.comparison import Comparison, compare
from fpn_export.demo.demonstration import Demonstration, demonstrate
from fpn_export.demo.folder import DemoFolder
from fpn_export.demo.page import Run, write_page

__all__ = ["Comparison", "DemoFolder", "Demonstration", "Run", "compare", "demonstrate", "write_page"]

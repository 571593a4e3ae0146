"""Verification: two forms of a model on the same images, stage by stage, and the first stage where they part."""

from fpn_export.verification.comparison import Comparison, compare
from fpn_export.verification.opening import OpenOptions, open_subject
from fpn_export.verification.subject import Subject

__all__ = ["Comparison", "OpenOptions", "Subject", "compare", "open_subject"]

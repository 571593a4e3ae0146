"""The proposals that a subcommand gives to a Fast R-CNN."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fpn_engine.errors import ProposalError

if TYPE_CHECKING:
    from fpn_engine.masks.spec import AnySpec
    from fpn_engine.proposals import GivenProposals

ProposalsOption = Annotated[
    Path | None,
    typer.Option("--proposals", metavar="FILE", help="What a Fast R-CNN classifies: COCO results JSON or .npz."),
]


def open_proposals(
    spec: AnySpec, path: Path | None, image_ids: Mapping[str, int] | None = None
) -> GivenProposals | None:
    """The proposals in ``path``, or None for a model that finds its own.

    Args: image_ids: the annotations' id of each file name, if there are annotations.
    Raises: ProposalError if the model needs proposals and has none, has some and needs none, or the file is wrong.
    """
    if path is None and not spec.has_rpn:
        raise ProposalError("this plan is a Fast R-CNN, which detects among given proposals; give --proposals FILE")
    if path is None:
        return None
    if spec.has_rpn:
        raise ProposalError("this plan finds its own proposals; --proposals is for a Fast R-CNN only")
    from fpn_engine.proposal_file import load_proposals
    from fpn_engine.proposals import GivenProposals

    return GivenProposals(path, load_proposals(path), image_ids)

"""Loading: the trunk and box head of a plan, by the backend that it names."""

from __future__ import annotations

from fpn_engine.backends import BoxHead, Trunk
from fpn_engine.errors import PlanError
from fpn_engine.plan import Plan, rebuild_hint

BACKENDS = ("onnxruntime", "native")
PRECISIONS = ("fp32", "bf16")


def load_parts(plan: Plan, threads: int | None = None) -> tuple[Trunk, BoxHead | None]:
    """Make both neural parts ready; an RPN alone has no box head.

    Args: threads: CPU threads, None takes one per core.
    Raises: PlanError if the plan was built for something else than what is here.
    """
    manifest = plan.manifest
    if manifest.backend == "onnxruntime":
        from fpn_engine.backends.ort import load_ort

        return load_ort(plan, threads)
    if manifest.backend == "native":
        from fpn_engine.backends.native import load_native

        return load_native(plan, threads)
    kind = f"{manifest.backend} {manifest.precision} on {manifest.device}"
    raise PlanError(f"the plan is for {kind}, which this version does not run; {rebuild_hint(manifest)}")

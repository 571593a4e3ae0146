"""``fpn-engine doctor``: what this machine has and what does not work."""

from __future__ import annotations

import json as json_module
from typing import Annotated

import typer

from fpn_engine.cli.console import emit, show


def doctor(json: Annotated[bool, typer.Option("--json", help="The findings as JSON on stdout.")] = False) -> None:
    """Check devices, versions and known bad combinations; exit code 1 if something does not work."""
    import dataclasses

    from fpn_engine.doctor import examine

    findings = examine()
    healthy = all(finding.kind != "problem" for finding in findings)
    if json:
        listed = [dataclasses.asdict(finding) for finding in findings]
        emit(json_module.dumps({"healthy": healthy, "findings": listed}, indent=1))
    else:
        from fpn_engine.doctor.report import findings_table

        problems = sum(finding.kind == "problem" for finding in findings)
        verdict = "everything works" if healthy else f"{problems} {'problem' if problems == 1 else 'problems'}"
        show(findings_table(findings), verdict)
    if not healthy:
        raise typer.Exit(1)

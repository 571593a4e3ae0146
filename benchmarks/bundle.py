"""A trained checkpoint as the model that comes with the package: half precision, with its JSON beside it.

python -m benchmarks.bundle run/best.pth
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from fpn_engine.files import replacing
from fpn_export.bundled import CHECKPOINT
from fpn_export.checkpoint import load_checkpoint


def bundle(checkpoint: Path, target: Path) -> None:
    """Write ``target`` (.safetensors, fp16) and its JSON: the spec, and how it was trained."""
    loaded = load_checkpoint(checkpoint)
    state = loaded.model.state_dict()
    weights = {name: t.to(torch.float16).contiguous() for name, t in state.items() if t.is_floating_point()}
    with replacing(target) as temporary:
        save_file(weights, temporary)
        temporary.chmod(0o644)  # it is for all who install the package
        digest = hashlib.sha256(temporary.read_bytes()).hexdigest()
    about = json.loads(checkpoint.with_suffix(".json").read_text())["about"]
    values = {**loaded.spec.to_dict(), "source": ""}
    document = {"spec": values, "about": {**about, "precision": "fp16", "sha256": digest}}
    with replacing(target.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(document, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=CHECKPOINT)
    given = parser.parse_args()
    bundle(given.checkpoint, given.output)
    print(f"{given.output}: {given.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()

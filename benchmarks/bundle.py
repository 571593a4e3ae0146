"""A trained checkpoint as a model that comes with the package: half precision, with its JSON beside it.

python -m benchmarks.bundle run/best.pth [--name scene-masks]
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from fpn_engine.errors import CheckpointError
from fpn_engine.files import replacing
from fpn_engine.named import BUNDLED, MODELS
from fpn_export.any_model import load_any
from fpn_export.bundled import find_bundled

LIMIT = 8_000_000  # bytes of a bundled checkpoint, which everybody who installs the package gets
LIMITS = {"fpn_masks": 6_000_000}


def bundle(checkpoint: Path, target: Path) -> None:
    """Write ``target`` (.safetensors, fp16) and its JSON: the spec, and how it was trained."""
    loaded = load_any(checkpoint)
    state = loaded.model.state_dict()
    weights = {name: t.to(torch.float16).contiguous() for name, t in state.items() if t.is_floating_point()}
    with replacing(target) as temporary:
        save_file(weights, temporary)
        limit = LIMITS.get(loaded.spec.model, LIMIT)
        if temporary.stat().st_size > limit:
            raise CheckpointError(f"{checkpoint} makes a file above {limit / 1e6:.0f} MB; bundle a smaller model")
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
    names = [model.name for model in MODELS if not model.file_name]
    parser.add_argument("--name", choices=names, default=BUNDLED, help="what --model calls it")
    parser.add_argument("-o", "--output", type=Path, help="default: where the package has it")
    given = parser.parse_args()
    target = given.output or find_bundled(given.name)
    bundle(given.checkpoint, target)
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()

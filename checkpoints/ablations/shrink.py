"""Stores the matrices of trained networks as bfloat16, half the size: python
checkpoints/ablations/shrink.py FOLDER ...

Loading brings them back to float32. Vectors and numbers stay as they are: the knots of the noise
schedule need their digits.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dia_lightning.lm.files import hash_of


def main(*folders: str) -> None:
    """Rewrite each FOLDER/model.safetensors."""
    for file in (Path(folder) / "model.safetensors" for folder in folders):
        weights = load_file(file)
        save_file(
            {k: w.to(torch.bfloat16) if w.dim() > 1 else w for k, w in weights.items()},
            file,
            {"format": "pt"},
        )
        file.chmod(0o644)
        settings = json.loads((file.parent / "config.json").read_text(encoding="utf-8"))
        if "weights_hash" in settings:  # else loading would call the file another one
            settings["weights_hash"] = hash_of(file)
            text = json.dumps(settings, indent=2) + "\n"
            (file.parent / "config.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])

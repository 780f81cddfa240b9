"""Stores the matrices of trained networks as bfloat16, half the size: python
checkpoints/ablations/shrink.py FOLDER ...

Loading brings them back to float32. Vectors and numbers stay as they are: the knots of the noise
schedule need their digits.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


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


if __name__ == "__main__":
    main(*sys.argv[1:])

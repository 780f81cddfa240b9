"""Writes what was trained as safetensors, so that the next command can load it by a folder name."""

from pathlib import Path

import lightning as L


class Export(L.Callback):
    """At the end of `fit` (rank zero), calls the module's `export(folder)`; EMA weights where an EMA callback runs before.

    Args:
        folder: where to write. An existing export there is replaced.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            pl_module.export(self.folder)  # type: ignore[operator]

"""What a run says once: its base model, and the folder that it writes to."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from dia_lightning.callbacks import Export, PredictionWriter
from dia_lightning.errors import UserError
from dia_lightning.settings.messages import is_typed, typed_option
from dia_lightning.settings.places import class_of

_WRITER = "dia_lightning.callbacks.PredictionWriter"
_LOGGER = "lightning.pytorch.loggers.TensorBoardLogger"
_SAMPLING = {
    "precision": "bf16-mixed",
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "callbacks": [{"class_path": _WRITER}],
}
# Of the trainer, by command.
TRAINER_DEFAULTS: dict[str, dict[str, Any]] = {"predict": _SAMPLING, "test": _SAMPLING}


def share_base_lm(config: Namespace, arguments: Sequence[str]) -> None:
    """Give the data the model's base_lm.

    Raises:
        UserError: if the data names another one.
    """
    model, data = (config[name].get("init_args") or Namespace() for name in ("model", "data"))
    if "base_lm" not in model or "base_lm" not in data:
        return
    if data.base_lm not in (None, model.base_lm):
        option, _ = typed_option(["data", "init_args", "base_lm"], arguments)
        raise UserError(
            f"{option}: {data.base_lm} given, allowed: the model's, {model.base_lm}; leave it out,"
            " --model.base_lm is for both"
        )
    data.base_lm = model.base_lm


def share_folder(config: Namespace, command: str, arguments: Sequence[str]) -> None:
    """Set the folders that no other option places to `--out`.

    On the command line `--out` wins over folders in files. A folder that the command line names
    itself wins over `--out`.
    """
    trainer, typed = config.trainer, is_typed("--out", arguments)
    if config.out == "":
        raise UserError("--out: an empty name given, needed is a folder")
    if trainer.default_root_dir is not None and (
        not typed or is_typed("--trainer.default_root_dir", arguments)
    ):
        config.out = None  # all that follows is placed by the other option
    else:
        config.out = trainer.default_root_dir = str(config.out or f"runs/{command}")
    root = trainer.default_root_dir
    if typed and not is_typed("--trainer.callbacks", arguments, "folder"):
        for callback in trainer.callbacks or []:
            if _is(callback, PredictionWriter, Export) and callback.get("init_args"):
                callback.init_args.folder = None
    if trainer.logger in (None, True) and trainer.logger is not False:
        trainer.logger = Namespace(
            class_path=_LOGGER, init_args=Namespace(save_dir=str(root), name="")
        )
    loggers = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
    if typed and not is_typed("--trainer.logger", arguments, "save_dir"):
        for logger in loggers:
            if _is(logger, TensorBoardLogger, CSVLogger):
                logger.init_args.save_dir = root


def _is(setting: Any, *kinds: type) -> bool:
    made = class_of(setting) if isinstance(setting, Namespace) else None
    return inspect.isclass(made) and issubclass(made, kinds)

"""Finds the settings of a kit, in its folder or on the hub; light, since every command asks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dia_lightning.errors import UserError
from dia_lightning.files import find_path, read_yaml, require_path
from dia_lightning.lm.files import HUB, from_hub

SETTINGS = "dia.yaml"
SECTIONS = ("seed_everything", "trainer", "model", "data")
# A stranger's settings may name classes of these only.
OWN = ("dia_lightning.", "lightning.pytorch.")
# Settings may import from these packages unasked; a path alone may name a part.
_IMPORTED = ("lightning", "torch", "torchmetrics", "transformers")


def settings_file(name: str, option: str) -> Path:
    """The YAML file that `--config NAME` means: a file, a kit's folder, or `hub:USER/REPO`.

    Raises:
        UserError: if there is none, or if a kit of the hub could run foreign code.
    """
    if name.startswith(HUB):
        path = from_hub(name, SETTINGS, option) / SETTINGS
        _check_stranger(read_yaml(path, option), name, option)
        return path
    if find_path(name) is None and name.count("/") == 1 and not Path(name).suffix:
        advice = f"a kit of the hub is named hub:{name}"
        raise UserError(f"{option}: no such file or folder: {name}; {advice}")
    path = require_path(name, option)
    inside = path / SETTINGS
    return inside if inside.is_file() else path


def is_own(class_path: str) -> bool:
    """Whether it names a class of these packages; a short name, as `Annealed`, imports nothing."""
    return class_path.startswith(OWN) or class_path.isidentifier()


def _check_stranger(content: dict[str, Any], name: str, option: str) -> None:
    """Foreign classes could run anything, `ckpt_path` a pickle, `${oc.env:…}` could read keys."""
    from dia_lightning.settings.building import leaves

    faults = [f"sets {key}" for key in content if key not in SECTIONS]
    for path, value in leaves("", content):
        root, *inner = str(value).split(".")
        names_class = path.endswith(".class_path") or (inner and root in _IMPORTED)
        if names_class and not is_own(str(value)):
            faults.append(f"names the class {value} ({path})")
        if "${oc." in str(value):
            faults.append(f"reads {value} ({path})")
    if faults:
        raise UserError(
            f"{option}: {SETTINGS} of {name} {faults[0]}, which is not done for a kit that comes "
            "from the hub; download its folder, read it, and give the folder"
        )

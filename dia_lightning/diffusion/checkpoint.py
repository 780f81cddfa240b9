"""Trained networks on disk: a folder (also of the hub) with `config.json` and
`model.safetensors`, or a Lightning `.ckpt`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from torch import Tensor, nn

from dia_lightning.diffusion.adapted import AdaptedTrunk
from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.diffusion.infiller import InfillerTrunk
from dia_lightning.errors import UserError
from dia_lightning.files import in_place, require_path
from dia_lightning.lm.files import hash_of, local

_SCHEMA = 1


def save_network(network: nn.Module, settings: dict[str, Any], folder: Path) -> None:
    """Write `network` to `folder` as float32."""
    save_weights(
        {k: v.detach().float().contiguous().cpu() for k, v in network.state_dict().items()},
        settings,
        folder,
    )


def save_weights(weights: dict[str, Tensor], settings: dict[str, Any], folder: Path) -> None:
    """Write weights and settings as `read_network` gives them, both files moved into place
    whole; OSError names the file.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    with in_place(folder / "model.safetensors") as partial:
        save_file(weights, partial)
        digest = hash_of(partial)
    with in_place(folder / "config.json") as partial:
        partial.write_text(
            json.dumps({**settings, "weights_hash": digest}, indent=2) + "\n", encoding="utf-8"
        )


def read_network(
    path: str, kind: str, argument: str, embedding: TokenEmbedding
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and weights of the `kind` of network at `path`; from a `.ckpt` the averaged (EMA)
    weights where it has them.

    Raises:
        UserError: if it is missing, damaged, of another kind or schema, or was trained on another
            embedding table, or on raw rows where `embedding` has rows of one norm, or the other way
            round.
    """
    settings, weights = _read(path, kind, argument)
    if settings["embedding"] != embedding.fingerprint():
        raise UserError(
            f"{argument}: {path} was trained on the embeddings of another base model"
            f" ({settings['base_lm']}); give that one as base_lm, or train for yours"
        )
    if settings["normalise"] != embedding.normalise:
        has, needed = ("normalised", "raw") if settings["normalise"] else ("raw", "normalised")
        raise UserError(
            f"{argument}: {path} was trained on {has} embeddings, but the rest is on {needed} ones "
            "(normalise, when they were trained)"
        )
    return settings, weights


def is_normalised(path: str, kind: str, argument: str) -> bool:
    """Whether the network at `path` was trained on embeddings of one norm; UserError as for
    `read_network`.
    """
    return bool(_read(path, kind, argument)[0]["normalise"])


def _read(path: str, kind: str, argument: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    found = require_path(local(path, "config.json", argument), argument)
    try:
        settings, weights = _read_folder(found) if found.is_dir() else _read_ckpt(found)
    except UserError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise UserError(
            f"{argument}: {path} is no checkpoint of a {kind}, or it is damaged ({reason})"
        ) from error
    if settings.get("kind") != kind:
        raise UserError(
            f"{argument}: {path} given, allowed: a {kind}; it holds a"
            f" {settings.get('kind', 'foreign model')}"
        )
    if settings.get("schema") != _SCHEMA:
        raise UserError(
            f"{argument}: {path} has schema {settings.get('schema')}, this version reads {_SCHEMA}"
        )
    return {"normalise": True, **settings}, weights


def load_weights(
    network: nn.Module,
    settings: dict[str, Any],
    weights: dict[str, Tensor],
    argument: str,
    path: str,
) -> None:
    """Put `weights`, read from `path` with `settings`, into `network`.

    Raises:
        UserError: where they do not fit, or adapt the blocks of another base model.
    """
    trunk = getattr(network, "trunk", None)
    # Schema 1 began without the fingerprint.
    if isinstance(trunk, AdaptedTrunk | InfillerTrunk) and settings.get("blocks", "") not in (
        "",
        trunk.fingerprint(),
    ):
        does = "adapts the blocks of" if isinstance(trunk, AdaptedTrunk) else "reads the left with"
        raise UserError(
            f"{argument}: {path} {does} another base model with the same embeddings"
            f" ({settings['base_lm']}); give that one as base_lm, or train for yours"
        )
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(
            f"{argument}: {path} does not fit a network of this size ({reason[:160]})"
        ) from error


def _read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors.torch import load_file

    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    digest = settings.pop("weights_hash", None)  # exports of earlier versions have none
    if digest not in (None, hash_of(folder / "model.safetensors")):
        raise ValueError("model.safetensors is not the file that was written with config.json")
    return settings, load_file(folder / "model.safetensors")


def _read_ckpt(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    checkpoint = load_checkpoint(file)
    if "dia" not in checkpoint:
        raise UserError(f"{file} was not written by this package")
    prefix = "network."
    state = checkpoint["state_dict"].items()
    return checkpoint["dia"], {k.removeprefix(prefix): v for k, v in state if k.startswith(prefix)}


def load_checkpoint(file: Path) -> dict[str, Any]:
    """The content of a Lightning `.ckpt`: tensors and plain values, on the CPU, mapped from the
    file.

    Raises:
        ValueError: if it is none, is damaged, or is a pickle of anything more, of which nothing is
            run.
    """
    try:
        with ZipFile(file) as archive:
            damaged = archive.testzip()  # torch does not look at the checksums that it writes
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f" ({named[1]})" if named else ""
        raise ValueError(
            f"it is a pickle of more than weights and plain values{what}, which could run code"
        ) from error
    except (BadZipFile, RuntimeError) as error:
        raise ValueError(str(error).splitlines()[0]) from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise ValueError("it has no state_dict")
    return content

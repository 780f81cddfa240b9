"""Trained networks on disk: a folder (also of the hub) with `config.json` and `model.safetensors`, or a Lightning `.ckpt`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dia_lightning.diffusion.adapted import AdaptedTrunk
from dia_lightning.embedding import TokenEmbedding
from dia_lightning.lm_files import local
from dia_lightning.resources import UserError, require_path

_SCHEMA = 1


def save_network(network: nn.Module, settings: dict[str, Any], folder: Path) -> None:
    """Write `network` to `folder` as float32."""
    save_weights({k: v.detach().float().contiguous().cpu() for k, v in network.state_dict().items()}, settings, folder)


def save_weights(weights: dict[str, Tensor], settings: dict[str, Any], folder: Path) -> None:
    """Write weights and settings as `read_network` gives them, both files moved into place whole."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    file, config = folder / "model.safetensors", folder / "config.json"
    save_file(weights, f"{file}.tmp")
    Path(f"{file}.tmp").replace(file)
    Path(f"{config}.tmp").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    Path(f"{config}.tmp").replace(config)


def read_network(path: str, kind: str, option: str, embedding: TokenEmbedding) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and weights of the `kind` of network at `path`; from a `.ckpt` the averaged (EMA) weights where it has them.

    Raises:
        UserError: if it is missing, damaged, of another kind or schema, or was trained on another embedding table, or on
            raw rows where `embedding` has rows of one norm, or the other way round.
    """
    settings, weights = _read(path, kind, option)
    if settings["embedding"] != embedding.fingerprint():
        raise UserError(
            f"{option}: {path} was trained on the embeddings of another base model ({settings['base_lm']}); "
            "give that one as base_lm, or train for yours"
        )
    if settings["normalise"] != embedding.normalise:
        has, needed = ("normalised", "raw") if settings["normalise"] else ("raw", "normalised")
        raise UserError(
            f"{option}: {path} was trained on {has} embeddings, but the rest is on {needed} ones "
            "(when training: --model.init_args.normalise)"
        )
    return settings, weights


def is_normalised(path: str, kind: str, option: str) -> bool:
    """Whether the network at `path` was trained on embeddings of one norm; UserError as for `read_network`."""
    return bool(_read(path, kind, option)[0]["normalise"])


def _read(path: str, kind: str, option: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    found = require_path(local(path, "config.json", option), option)
    try:
        settings, weights = _read_folder(found) if found.is_dir() else _read_ckpt(found)
    except UserError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise UserError(f"{option}: {path} is no checkpoint of a {kind}, or it is damaged ({reason})") from error
    if settings.get("kind") != kind:
        raise UserError(f"{option}: {path} holds a {settings.get('kind', 'foreign model')}, a {kind} is needed")
    if settings.get("schema") != _SCHEMA:
        raise UserError(f"{option}: {path} has schema {settings.get('schema')}, this version reads {_SCHEMA}")
    return {"normalise": True, **settings}, weights


def load_weights(network: nn.Module, settings: dict[str, Any], weights: dict[str, Tensor], option: str, path: str) -> None:
    """Put `weights`, read from `path` with `settings`, into `network`.

    Raises:
        UserError: where they do not fit, or adapt the blocks of another base model.
    """
    trunk = getattr(network, "trunk", None)
    # Schema 1 began without the fingerprint.
    if isinstance(trunk, AdaptedTrunk) and settings.get("blocks", "") not in ("", trunk.fingerprint()):
        raise UserError(
            f"{option}: {path} adapts the blocks of another base model with the same embeddings ({settings['base_lm']}); "
            "give that one as base_lm, or train for yours"
        )
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{option}: {path} does not fit a network of this size ({reason[:160]})") from error


def _read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors.torch import load_file

    return json.loads((folder / "config.json").read_text(encoding="utf-8")), load_file(folder / "model.safetensors")


def _read_ckpt(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    if "dia" not in checkpoint:
        raise UserError(f"{file} was not written by this package")
    prefix = "network."
    state = checkpoint["state_dict"].items()
    return checkpoint["dia"], {k.removeprefix(prefix): v for k, v in state if k.startswith(prefix)}

"""Writes a kit: a folder of safetensors and YAML that samples wherever it lies."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from torch import Tensor

from dia_lightning.callbacks.export import training_costs
from dia_lightning.diffusion.checkpoint import read_network, save_weights
from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.errors import UserError
from dia_lightning.files import HERE, find_path, is_shipped, read_yaml
from dia_lightning.lab.kit.card import Kit, KitPart, card
from dia_lightning.lab.kit.files import SECTIONS, SETTINGS, settings_file
from dia_lightning.lab.report.results import read_metrics
from dia_lightning.lm.files import folder_of, is_hub_id
from dia_lightning.samplers import GuidedSamplerModule
from dia_lightning.samplers.networks import embedding_for, load_critic, load_denoiser
from dia_lightning.settings.building import leaves
from dia_lightning.settings.parser import build_model, options_of

_COMMENT = """# Sample with this kit, from any folder:
#   lightning predict --config NAME
# HERE is the folder of this file. README.md describes the kit.
""".replace("HERE", HERE)
NETWORKS = ("denoiser", "critic")
# Of a model's folder: no pickle and no code.
_LM_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")


def export(
    config: str,
    out: Path,
    bf16: bool = False,
    with_base_lm: bool = False,
    run: Path | None = None,
    license: str | None = None,
    overwrite: bool = False,
    allow: Sequence[str] = (),
) -> Kit:
    """Write the kit of a sampler's settings to the folder `out`, which appears whole.

    Args:
        config: as `lightning predict --config`, relative paths in it included.
        out: a missing folder, or with `overwrite` a kit.
        bf16: round the matrices of denoiser and critic. p_θ is part of the target: never rounded.
        with_base_lm: copy the base model too.
        run: a finished run of these settings, for the card's figures.
        license: for the card.
        overwrite: replace the kit in `out`.
        allow: as `parser.run`.

    Raises:
        UserError: if the settings are no sampler's, are damaged or name files that no kit holds;
            if `run` is unfinished or of other settings; if `out` cannot be written.
    """
    _check_free(out, overwrite)
    file = settings_file(config, "--config")
    content = read_yaml(file, "--config")
    arguments = ["predict", "--config", str(file)]
    figures, compared = (None, False) if run is None else _figures(run, arguments, allow)
    module = build_model(arguments, allow)
    if not isinstance(module, GuidedSamplerModule):
        kind = type(module).__name__
        raise UserError(f"--config: {config} has the model {kind}, a sampler is needed")
    paths = {name: path for name in NETWORKS if (path := getattr(module, name, None)) is not None}
    if not paths and not with_base_lm:
        reason = "there is nothing to put into a kit"
        raise UserError(f"--config: {config} names no denoiser and no critic; {reason}")
    left = _move_in(content, module, [*paths], with_base_lm, out.name)
    embedding = embedding_for(module.lm, paths.get("denoiser"), paths.get("critic"))
    copied = with_base_lm and not is_hub_id(module.base_lm)
    base_lm = f"{out.name}/lm" if copied else module.base_lm
    with _in_place(out) as folder:
        parts = _write_networks(folder, module, embedding, paths, bf16, base_lm)
        if with_base_lm:
            parts.append(_copy_lm(folder / "lm", module))
        kit = Kit(out.name, content, module, embedding, parts, figures, compared, left)
        settings = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=128)
        (folder / SETTINGS).write_text(
            f"{_COMMENT.replace('NAME', out.name)}{settings}", encoding="utf-8"
        )
        (folder / "README.md").write_text(card(kit, license), encoding="utf-8")
    return kit


def _check_free(out: Path, overwrite: bool) -> None:
    if not out.name:
        raise UserError(f"--out: {out} given, the name of a new folder is needed")
    if out.exists() and not overwrite:
        advice = "give another folder, or --overwrite to replace the kit in it"
        raise UserError(f"--out: {out} is there already; {advice}")
    if out.exists() and not (out / SETTINGS).is_file():
        reason = f"it holds no {SETTINGS}"
        raise UserError(f"--out: {out} is no kit ({reason}), so it is not replaced")


@contextmanager
def _in_place(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` at the end, or goes where something fails."""
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.absolute().parent))
    except OSError as error:
        raise UserError(f"--out: cannot write to {out} ({error.strerror})") from error
    replaced = partial.with_name(f"{partial.name}.replaced")
    try:
        yield partial
        # Temporary folders and safetensors are readable by their owner alone.
        for path in (partial, *partial.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        if out.exists():
            out.rename(replaced)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def _figures(run: Path, arguments: list[str], allow: Sequence[str]) -> tuple[dict[str, Any], bool]:
    """`metrics.json` of a run, and whether its settings are known.

    Its model must be that of `arguments` except for the seed and the sharding of p_θ.
    """
    figures = read_metrics(run, "--run")
    config = run / "parts" / str(figures["config_hash"]) / "config.yaml"
    if config.is_file():
        made_with = ["predict", "--config", str(config)]
        own, other = (_options(args, allow) for args in (arguments, made_with))
        for name in [*own, *other]:
            if own.get(name) != other.get(name) and not name.endswith((".seed", ".shard_base_lm")):
                made, asked = (
                    ", ".join(map(str, found.get(name, ["none"]))) for found in (other, own)
                )
                raise UserError(f"--run: {run} was made with {name} {made}, --config has {asked}")
    return figures, config.is_file()


def _options(arguments: list[str], allow: Sequence[str]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for name, value in leaves("--model", options_of(arguments, allow)["model"]):
        found.setdefault(name, []).append(value)
    return found


def _move_in(
    content: dict[str, Any],
    module: GuidedSamplerModule,
    networks: list[str],
    with_base_lm: bool,
    name: str,
) -> dict[str, str]:
    """Make `content` the settings of the kit called `name`; return the options left out."""
    for section in ("model", "data"):
        if not isinstance(content.get(section), dict):
            given = content.get(section)
            needed = f"needed is {section} with class_path and init_args"
            raise UserError(f"--config: {needed}, given {given}")
    if content.get("ckpt_path"):
        advice = "name the checkpoint as denoiser or critic"
        raise UserError(f"--config: ckpt_path is set, whose weights no kit holds; {advice}")
    for section in [key for key in content if key not in SECTIONS]:
        del content[section]
    model, data = (content[part].setdefault("init_args", {}) for part in ("model", "data"))
    model |= {network: f"{HERE}/{network}" for network in networks}
    model.pop("shard_base_lm", None)  # for this machine's GPUs
    if with_base_lm:
        model["base_lm"] = f"{HERE}/lm"
        data |= {"base_lm": f"{HERE}/lm"} if "base_lm" in data else {}
    elif module.base_lm.startswith(("/", "~")):
        where = f"a folder of this machine ({module.base_lm})"
        raise UserError(f"--with-base-lm: needed, as base_lm is {where}")
    trainer = content.setdefault("trainer", {})
    trainer["default_root_dir"] = f"runs/{name}"
    for callback in trainer.get("callbacks") or []:
        if "folder" in callback.get("init_args", {}):
            callback["init_args"]["folder"] = f"runs/{name}"
    left = {
        f"--data.{option}": value
        for option, value in data.items()
        if option != "base_lm" and _is_own_file(value)
    }
    data |= {option.removeprefix("--data."): None for option in left}
    written = ("base_lm", "default_root_dir", "folder", "save_dir")
    for option, value in leaves("", {key: content[key] for key in ("trainer", "model", "data")}):
        if _is_own_file(value) and option.rpartition(".")[2] not in written:
            held = "only denoiser, critic and base_lm are copied"
            raise UserError(f"--config: {option} names {value}, which no kit holds; {held}")
    return left


def _is_own_file(value: Any) -> bool:
    """Whether it names a file or folder that does not come with the package."""
    if not isinstance(value, str) or not ("/" in value or Path(value).suffix):
        return False
    return find_path(value) is not None and not is_shipped(value)


def _write_networks(
    folder: Path,
    module: GuidedSamplerModule,
    embedding: TokenEmbedding,
    paths: dict[str, str],
    bf16: bool,
    base_lm: str,
) -> list[KitPart]:
    """Denoiser and critic, after they were loaded as a sampler does."""
    parts, costs = [], training_costs(paths)
    for name, path in paths.items():
        if name == "denoiser":
            load_denoiser(path, embedding, module.lm)
        else:
            load_critic(path, embedding, module.reward.name, module.lm)
        settings, weights = read_network(path, name, f"--model.init_args.{name}", embedding)
        weights = {key: _rounded(weight) if bf16 else weight for key, weight in weights.items()}
        save_weights(weights, {**settings, "base_lm": base_lm}, folder / name)
        if name in costs:
            text = json.dumps(costs[name], indent=2) + "\n"
            (folder / name / "costs.json").write_text(text, encoding="utf-8")
        parts.append(_part(folder / name, settings, costs.get(name, {})))
    return parts


def _rounded(weight: Tensor) -> Tensor:
    # The knots of the noise schedule, and all that is a vector, need their digits.
    return weight.to(torch.bfloat16) if weight.dim() > 1 and weight.is_floating_point() else weight


def _copy_lm(folder: Path, module: GuidedSamplerModule) -> KitPart:
    folder.mkdir()
    source = Path(folder_of(module.base_lm))
    for file in [file for pattern in _LM_FILES for file in source.glob(pattern)]:
        shutil.copyfile(file, folder / file.name)
    return _part(folder, {}, {})


def _part(folder: Path, settings: dict[str, Any], costs: dict[str, Any]) -> KitPart:
    from safetensors import safe_open

    n, size, kinds = 0, 0, []
    for path in folder.glob("*.safetensors"):
        size += path.stat().st_size
        with safe_open(path, "pt") as file:
            tensors = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118
        n += sum(prod(tensor.get_shape()) for tensor in tensors)
        kinds += [tensor.get_dtype() for tensor in tensors if len(tensor.get_shape()) > 1]
    return KitPart(folder.name, n, ", ".join(sorted(set(kinds))), size, settings, costs)

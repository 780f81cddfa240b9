"""The model card of a kit: README.md of its folder, as the hub reads it."""

from __future__ import annotations

import datetime
import math
from typing import Any, NamedTuple

import yaml  # type: ignore[import-untyped]

from dia_lightning.callbacks.run_files import versions
from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.files import find_path, is_shipped
from dia_lightning.lab.kit.files import is_own
from dia_lightning.lab.report.labels import label, number
from dia_lightning.lm.files import is_hub_id
from dia_lightning.samplers import GuidedSamplerModule
from dia_lightning.settings.building import leaves
from dia_lightning.settings.messages import TRUSTED

_TAGS = ["dia-lightning", "diffusion", "reward-guided", "text-generation"]
_FIGURES = (
    *("reward", "reward_std", "perplexity", "log_p_per_token", "distinct_2", "self_bleu"),
    *("accept_rate", "log_z", "log_z_reverse", "seconds_per_text", "flops_per_text", "n"),
)


class KitPart(NamedTuple):
    """A folder of the kit.

    weights: numbers in its safetensors. dtype: of the matrices. size: in bytes. settings: of a
    network's training. costs: its `costs.json`, {} for none.
    """

    name: str
    weights: int
    dtype: str
    size: int
    settings: dict[str, Any]
    costs: dict[str, Any]


class Kit(NamedTuple):
    """The content of a kit and of its card.

    content: the settings, as in `dia.yaml`. parts: the copied folders. figures: `metrics.json` of
    a run, or None. compared: whether that run is known to have these settings. left: options
    whose files are not in the kit, with their values.
    """

    name: str
    content: dict[str, Any]
    module: GuidedSamplerModule
    embedding: TokenEmbedding
    parts: list[KitPart]
    figures: dict[str, Any] | None
    compared: bool
    left: dict[str, str]

    @property
    def has_lm(self) -> bool:
        return "lm" in {part.name for part in self.parts}

    @property
    def foreign(self) -> list[str]:
        """Classes of other packages in the settings."""
        named = [str(v) for name, v in leaves("", self.content) if name.endswith(".class_path")]
        return [name for name in dict.fromkeys(named) if not is_own(name)]

    @property
    def allow(self) -> str:
        """The options `--allow` that the settings need, each after a space."""
        asked = [name for name in self.foreign if name.partition(".")[0] not in TRUSTED]
        modules = dict.fromkeys(name.rpartition(".")[0] for name in asked)
        return "".join(f" --allow {module}" for module in modules)


def card(kit: Kit, license: str | None = None) -> str:
    """Front matter and text in Markdown; `license` is what the kit's author states."""
    from huggingface_hub import ModelCardData
    from jinja2 import Environment, PackageLoader

    base_lm = kit.module.base_lm
    data = ModelCardData(
        library_name="dia-lightning",
        pipeline_tag="text-generation",
        tags=_TAGS,
        base_model=base_lm if is_hub_id(base_lm) else None,
        license=license,
    )
    runs = [run for run in ((kit.figures or {}).get("base"), kit.figures) if run]
    reward = {"reward": kit.content["model"]["init_args"].get("reward")}
    environment = Environment(loader=PackageLoader(__package__), keep_trailing_newline=True)
    environment.filters["number"] = _number
    return environment.get_template("card.md").render(
        card_data=data.to_yaml(),
        kit=kit,
        networks=" and ".join(p.name for p in kit.parts if p.name != "lm") or "settings",
        sampler=type(kit.module).__name__,
        lam=getattr(kit.module, "lam", None),
        base_lm=base_lm,
        hub_lm=is_hub_id(base_lm),
        missing_lm=not kit.has_lm and find_path(base_lm) is not None and not is_shipped(base_lm),
        reward=yaml.safe_dump(reward, sort_keys=False, allow_unicode=True),
        trained=[part for part in kit.parts if part.costs],
        runs=runs,
        rows=[
            (label(name), [run.get(name) for run in runs])
            for name in _FIGURES
            if any(run.get(name) is not None for run in runs)
        ],
        made_with=lambda known: ", ".join(f"{name} {version}" for name, version in known.items()),
        versions=versions(),
        today=datetime.date.today().isoformat(),
        license=license,
    )


def _number(value: Any, digits: int) -> str:
    return number(value if isinstance(value, int | float) else math.nan, digits)

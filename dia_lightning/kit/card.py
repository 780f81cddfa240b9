"""The model card of a kit, README.md of its folder, in the form that the hub reads."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import yaml  # type: ignore[import-untyped]

from dia_lightning.callbacks.writer import versions
from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.files import find_path, is_shipped
from dia_lightning.kit.files import is_own
from dia_lightning.lm.files import is_hub_id
from dia_lightning.reports.labels import label, number
from dia_lightning.samplers import GuidedSamplerModule
from dia_lightning.settings.building import leaves
from dia_lightning.settings.messages import TRUSTED

_TAGS = ["dia-lightning", "diffusion", "reward-guided", "text-generation"]
_FIGURES = (
    "reward", "reward_std", "perplexity", "log_p_per_token", "distinct_2", "self_bleu", "accept_rate", "log_z", "log_z_upper",
    "seconds_per_text", "flops_per_text", "n",
)  # fmt: skip
_KINDS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_WHAT = {
    "denoiser": "diffusion over the token embeddings of p_θ; proposes moves, or samples",
    "critic": "value of noised text, trained on the reward; guides",
    "lm": "p_θ itself, with its tokenizer",
}


class Part(NamedTuple):
    """A folder of the kit.

    weights: numbers in its safetensors. dtype: of the matrices among them. size: in bytes. settings: of a network, those
    that it was trained with. costs: its `costs.json`, empty where there is none.
    """

    name: str
    weights: int
    dtype: str
    size: int
    settings: dict[str, Any]
    costs: dict[str, Any]


class Kit(NamedTuple):
    """What the card tells.

    content: the settings, as they stand in `dia.yaml`. module: the sampler. embedding: of its base model. parts: what was
    copied. figures: `metrics.json` of a run, or None. compared: whether that run is known to have these settings. left:
    options whose files are not in the kit, with what they named.
    """

    name: str
    content: dict[str, Any]
    module: GuidedSamplerModule
    embedding: TokenEmbedding
    parts: list[Part]
    figures: dict[str, Any] | None
    compared: bool
    left: dict[str, str]

    @property
    def has_lm(self) -> bool:
        return "lm" in {part.name for part in self.parts}

    @property
    def foreign(self) -> list[str]:
        """Classes of others in the settings."""
        named = [str(value) for name, value in leaves("", self.content) if name.endswith(".class_path")]
        return [name for name in dict.fromkeys(named) if not is_own(name)]

    @property
    def allow(self) -> str:
        """What the command line needs where the settings name such classes, after a space; "" where it needs nothing."""
        modules = dict.fromkeys(name.rpartition(".")[0] for name in self.foreign if name.partition(".")[0] not in TRUSTED)
        return "".join(f" --allow {module}" for module in modules)


def card(kit: Kit, license: str | None = None) -> str:
    """Front matter and text in Markdown; `license` is what the kit's author states, if anything."""
    from huggingface_hub import ModelCardData

    named = kit.module.base_lm if is_hub_id(kit.module.base_lm) else None
    data = ModelCardData(
        library_name="dia-lightning", pipeline_tag="text-generation", tags=_TAGS, base_model=named, license=license
    )
    sections = [_what(kit), _use(kit), _parts(kit), _reward(kit), _training(kit), _run(kit), _origin(kit, license)]
    return f"---\n{data.to_yaml()}\n---\n\n# {kit.name}\n\n" + "\n\n".join(sections) + "\n"


def _what(kit: Kit) -> str:
    lam = getattr(kit.module, "lam", None)
    density = "p_θ(x) exp(λ r(x))" + ("" if lam is None else f" with λ = {lam:g}")
    networks = " and ".join(part.name for part in kit.parts if part.name != "lm") or "settings"
    return (
        f"A kit of dia-lightning: {networks} for sampling text from π(x) ∝ {density}, where p_θ is {_base(kit)} and r "
        f"a reward, named below. No weight of p_θ is changed. The sampler is `{type(kit.module).__name__}` "
        f"({kit.module.method})."
    )


def _base(kit: Kit) -> str:
    name = kit.module.base_lm
    if kit.has_lm:
        return f"`{name}`, a copy of which is in `lm`," if is_hub_id(name) else "the language model in `lm`"
    return f"the language model `{name}`, which is not in this folder,"


def _use(kit: Kit) -> str:
    lines = [
        "## Use\n\n```sh",
        f"lightning predict --config {kit.name}                              # this folder, wherever it lies",
        f"lightning predict --config hub:USER/{kit.name}                     # the same from the hub",
        f"lightning predict --config {kit.name} --data.prompts prompts.txt   # texts that go on from your prompts",
        "```",
    ]
    notes = []
    if kit.foreign:
        named = ", ".join(f"`{name}`" for name in kit.foreign)
        notes.append(
            f"The settings name {named}, code that is not in this folder: Python has to find it (`PYTHONPATH=.`), "
            f"{f'the command has to allow it (`{kit.allow.strip()}`), ' if kit.allow else ''}and the kit can be used as a "
            "folder only, not straight from the hub."
        )
    if not kit.has_lm and find_path(kit.module.base_lm) is not None and not is_shipped(kit.module.base_lm):
        where = "is where the author had it; say where you do with `--base_lm`."
        notes.append(f"`{kit.module.base_lm}` {where}")
    notes += [f"`{option}` was `{value}`, which is not in this folder; give your own." for option, value in kit.left.items()]
    return "\n".join(lines) + "".join(f"\n\n{note}" for note in notes)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def _parts(kit: Kit) -> str:
    rows = [
        (
            f"`{part.name}`", _WHAT[part.name], number(part.weights, -1),
            ", ".join(_KINDS.get(kind, kind) for kind in part.dtype.split(", ")), number(part.size / 2**20, 1),
        )
        for part in kit.parts
    ]  # fmt: skip
    table = _table(("folder", "what", "parameters", "matrices in", "MiB"), rows)
    return (
        f"## Parts\n\n{table}\n\nThe fingerprint of p_θ's embedding table is `{kit.embedding.fingerprint()}` "
        f"({kit.embedding.vocab_size} tokens, {kit.embedding.dim} wide); the networks refuse any other. Everything is "
        "safetensors, JSON and YAML; `dia.yaml` has all settings."
    )


def _reward(kit: Kit) -> str:
    setting = yaml.safe_dump({"reward": kit.content["model"]["init_args"].get("reward")}, sort_keys=False, allow_unicode=True)
    trained = [part.settings for part in kit.parts if part.name == "critic"]
    critic = f" The critic was trained on it with the objective `{trained[0]['objective']}`." if trained else ""
    return f"## Reward\n\n`{kit.module.reward.name}`, larger is better.{critic}\n\n```yaml\n{setting}```"


def _training(kit: Kit) -> str:
    measured = (("flops", -1), ("seconds", 0), ("peak_memory_mib", 0))
    rows = [
        (f"`{part.name}`", *(number(part.costs.get(key, math.nan), digits) for key, digits in measured))
        for part in kit.parts
        if part.costs
    ]
    if not rows:
        return "## Training\n\nWhat it cost is not known: no `costs.json` lay beside the checkpoints."
    table = _table(("network", "FLOPs", "seconds", "peak memory (MiB)"), rows)
    return f"## Training\n\n{table}\n\nDrawing the training texts and validation included; `costs.json` of each says more."


def _run(kit: Kit) -> str:
    own = kit.figures
    if own is None:
        return "## Figures\n\nNo run was named when this card was written."
    base: dict[str, Any] = own.get("base") or {}
    runs = [run for run in (base, own) if run]
    rows = []
    for name in _FIGURES:
        known = [run.get(name) for run in runs]
        if any(value is not None for value in known):
            text, digits = label(name).text, label(name).digits
            rows.append((text, *("–" if value is None else number(value, digits) for value in known)))
    table = _table(("", *("p_θ" if run is base else str(own["method"]) for run in runs)), rows)
    made = ", ".join(f"{name} {version}" for name, version in own["versions"].items())
    doubt = "" if kit.compared else " Its settings were not compared with these: they are not known."
    return f"## Figures\n\n{table}\n\nFrom one run (key `{own['config_hash']}`; {made}).{doubt}"


def _origin(kit: Kit, license: str | None) -> str:
    made = ", ".join(f"{name} {version}" for name, version in versions().items())
    stated = f"Licence: {license}." if license else "No licence is stated."
    return (
        "## Origin and limits\n\n"
        f"Written by `lightning kit export` on {datetime.date.today().isoformat()} with {made}. {stated} What the licences of "
        "p_θ and its data ask for holds for these networks too.\n\nTexts follow the reward also where the reward is wrong, and "
        "inherit the faults of p_θ."
    )

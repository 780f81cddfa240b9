"""Short names of the options of an everyday run. Nothing heavy is imported here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

# --lam is --model.lam, --reward.words is --model.reward.words, and so on.
SHORT = {
    "lam": "model.lam",
    "reward": "model.reward",
    "prompts": "data.prompts",
    "n": "data.n_texts",
    "sampler": "model.sampler",
    "base_lm": "model.base_lm",
    "seed": "model.seed",
}
# The seed of a training is the trainer's: samplers alone have one of their own.
_FIT = {**SHORT, "seed": "seed_everything"}
# What people write without `model.` or `data.` before it.
_EVERYDAY = {
    name: f"{part}.{name}"
    for part, names in {
        "data": ("n_texts", "batch_size", "max_length", "length"),
        "data.reading": ("template", "limit", "fields", "split"),
        "model": ("denoiser", "critic", "compare_base"),
    }.items()
    for name in names
}


def expand(arguments: Iterable[str]) -> list[str]:
    """`arguments` with the long name in place of each short one."""
    known = list(arguments)
    names = _FIT if {"fit", "validate"} & set(known[:1]) else SHORT
    return [_expanded(argument, names) for argument in known]


def as_typed(message: str, arguments: Sequence[str]) -> str:
    """`message` with the short names that stand in `arguments`, where it has their long ones."""
    names = _FIT if {"fit", "validate"} & set(arguments[:1]) else SHORT
    typed = {argument.partition("=")[0].partition(".")[0][2:] for argument in arguments}
    for short in typed & set(names):
        parts = [re.escape(part) for part in names[short].split(".")]
        long = r"--" + r"\.(?:init_args\.)?".join(parts) + r"(?!\w)"
        message = re.sub(long, f"--{short}", message)
    return message


def outside(arguments: Sequence[str]) -> list[str]:
    """Options that are no option of the parser but may have been meant."""
    samples = {"test", "predict"} & set(arguments[:1])
    return [f"--{name}" for name in (*SHORT, *(_EVERYDAY if samples else ()))]


def in_full(name: str) -> str:
    """What to write for `name`: one of `outside`, another option, or an argument of a class."""
    bare = name.removeprefix("--")
    if bare != name and bare in SHORT:
        return f"{name} (--{SHORT[bare]})?"
    if bare != name and bare in _EVERYDAY:
        return f"--{_EVERYDAY[bare]}?"
    short = next((s for s, long in SHORT.items() if bare in (long, long.partition(".")[2])), "")
    return f"{name}? (--{short} for short)" if short else f"{name}?"


def _expanded(argument: str, names: dict[str, str]) -> str:
    found = re.match(r"--(\w+)(?=[.=+]|$)", argument)
    long = names.get(found[1]) if found else None
    return argument if found is None or long is None else f"--{long}{argument[found.end() :]}"

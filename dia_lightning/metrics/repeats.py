"""How different the texts of a prompt are: what a population that has collapsed shows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from dia_lightning.types import Generations, Record

# By prompt in every output, as far as the method has them.
BY_PROMPT = ("unique_texts", "roots", "ess")
# Of each text whose prompt gives something on the right of a blank, else NaN.
BY_BLANKS = ("log_p_right", "log_p_fill")
_MOST_PROMPTS = 16  # listed one by one in metrics.json
# Copies are a warning from this share of a prompt's texts on, and from this number on; not where
# p_θ writes such a text with this probability or more, or in so few tokens (end token included).
_SHARE, _COPIES = 0.5, 3
_NATURAL, _SHORT = 0.1, 3


class Copied(NamedTuple):
    """The `number` of a prompt in the run, from 1, of whose `n` texts `copies` are the same."""

    number: int
    copies: int
    n: int


def with_unique_texts(run: Sequence[Generations], known: Sequence[Record]) -> list[Generations]:
    """The batches with one diagnostic more, `unique_texts`: of the texts that the whole run has of
    a text's prompt, the share of different ones.

    Args:
        known: the record of each text, indexed by `Generations.ids`.
    """
    rows = _by_prompt(run, known)
    share = {key: len({text for text, *_ in texts}) / len(texts) for key, texts in rows.items()}
    return [
        replace(batch, diagnostics={**batch.diagnostics, "unique_texts": torch.tensor(values)})
        for batch in run
        for values in [[share[key] for key in _keys(batch, known)]]
    ]


def figures_by_prompt(run: Sequence[Generations], known: Sequence[Record]) -> dict[str, Any]:
    """`by_prompt` of metrics.json: of each prompt its number of texts, and means over them. Nothing
    where there are many prompts.
    """
    names = [name for name in (*BY_PROMPT, "log_z") if all(name in b.diagnostics for b in run)]
    found: dict[Hashable, dict[str, Any]] = {}
    sums: dict[Hashable, Counter[str]] = {}
    for batch in run:
        columns = {"reward": batch.reward, **{name: batch.diagnostics[name] for name in names}}
        for i, key in enumerate(_keys(batch, known)):
            found.setdefault(key, {"prompt": batch.prompts[i]})
            counted: Any = {name: float(values[i]) for name, values in columns.items()}
            sums.setdefault(key, Counter()).update({"n": 1, **counted})
    if len(found) > _MOST_PROMPTS:
        return {}
    for key, row in found.items():
        n = sums[key].pop("n")
        row |= {"n": n, **{name: value / n for name, value in sums[key].items()}}
    return {"by_prompt": list(found.values())}


def repeated(
    run: Sequence[Generations], base: Sequence[Generations], known: Sequence[Record]
) -> list[Copied]:
    """The prompts for which a large share of the texts is one and the same, though p_θ writes that
    text seldom, and its own texts `base`, where there are any, differ.
    """
    found = []
    usual = {key: _copies(texts) / len(texts) for key, texts in _by_prompt(base, known).items()}
    for number, (key, texts) in enumerate(_by_prompt(run, known).items(), 1):
        copies = _copies(texts)
        few = copies < max(_COPIES, _SHARE * len(texts))
        if not few and usual.get(key, 0.0) < _SHARE and not _natural(texts):
            found.append(Copied(number, copies, len(texts)))
    return found


def warnings_of(found: Sequence[Copied], settings: Mapping[str, Any], most: int = 5) -> list[str]:
    """One line a prompt, with the settings that help and their values; after `most`, how many
    more.
    """
    advice = " or ".join(f"{name} ({value})" for name, value in settings.items())
    advice = f"; raise {advice}" if advice else ""
    lines = [
        f"prompt {number}: {copies} of {n} texts are the same{advice}"
        for number, copies, n in found[:most]
    ]
    more = len(found) - most
    return [*lines, f"and {more} more"] if more > 0 else lines


# Text, log p_θ and tokens of it.
_Text = tuple[str, float, int]


def _keys(batch: Generations, known: Sequence[Record]) -> list[Hashable]:
    """Equal for texts of one prompt, as a sampler tells prompts apart (see `particles_of`)."""
    records = [known[i] if i < len(known) else {} for i in batch.ids]
    return [
        (prompt, id(record) if record else 0)
        for prompt, record in zip(batch.prompts, records, strict=True)
    ]


def _by_prompt(run: Sequence[Generations], known: Sequence[Record]) -> dict[Hashable, list[_Text]]:
    found: dict[Hashable, list[_Text]] = {}
    for batch in run:
        rows = zip(batch.texts, batch.log_p.tolist(), batch.n_tokens.tolist(), strict=True)
        for key, row in zip(_keys(batch, known), rows, strict=True):
            found.setdefault(key, []).append(row)
    return found


def _copies(texts: Sequence[_Text]) -> int:
    return Counter(text for text, *_ in texts).most_common(1)[0][1]


def _natural(texts: Sequence[_Text]) -> bool:
    ((most, _),) = Counter(text for text, *_ in texts).most_common(1)
    log_p, n_tokens = next((log_p, n) for text, log_p, n in texts if text == most)
    return log_p >= math.log(_NATURAL) or n_tokens <= _SHORT

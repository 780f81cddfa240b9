"""What people chose: read, summarised, written and printed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dia_lightning.errors import UserError
from dia_lightning.lab.preference.annotations import read_votes
from dia_lightning.terminal import console, visible


def summarise(key: dict[str, Any], votes: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Everything in `preference.json`, from the key and the choices by pair and annotator.

    A pair that several people judged counts once, by their majority; a balance is a tie.
    """
    from dia_lightning.lab.preference.comparison import (
        Comparison,
        compare,
        krippendorff_alpha,
        majority,
    )

    number = {method: i for i, method in enumerate(key["methods"])}
    scores = {"1": 1.0, "2": 0.0, "tie": 0.5}
    outcomes = []
    for pair, (method_1, method_2) in key["pairs"].items():
        if votes.get(pair):
            score = majority([scores[choice] for choice in votes[pair].values()])
            i, j = number[method_1], number[method_2]
            outcomes.append(Comparison(i, j, score) if i < j else Comparison(j, i, 1 - score))
    choices = Counter(choice for given in votes.values() for choice in given.values())
    by_annotator = Counter(name for given in votes.values() for name in given)
    decided = choices["1"] + choices["2"]
    return {
        "schema": 1,
        "pairs": {
            "n": len(key["pairs"]),
            "judged": len(outcomes),
            "unjudged": len(key["pairs"]) - len(outcomes),
            "judged_by_several": sum(len(given) > 1 for given in votes.values()),
            "identical": sum(count["identical"] for count in key["drawn"]),
        },
        "annotators": dict(sorted(by_annotator.items())),
        "krippendorff_alpha": krippendorff_alpha([[*given.values()] for given in votes.values()]),
        # Sides are random: far from ½ means that people favour a side.
        "left_share": choices["1"] / decided if decided else None,
        **compare(outcomes, key["methods"]),
    }


def import_choices(folder: Path, files: Sequence[Path]) -> None:
    """Read people's choices, write `preference.json` into `folder` and print its tables.

    Raises:
        UserError: if `folder` holds no export, or a file is not as it should be.
    """
    try:
        key = json.loads((folder / "key.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fault = f"{folder} holds no export of `dia preference export` ({error})"
        raise UserError(f"preference import: {fault}") from error
    votes = read_votes(files, set(key["pairs"]))
    if not votes:
        counted = "controls comparison and tie, column choice"
        raise UserError(f"--annotations: no choice in these files ({counted})")
    result = summarise(key, votes)
    text = json.dumps(result, ensure_ascii=False, indent=2)
    (folder / "preference.json").write_text(f"{text}\n", encoding="utf-8")
    print_preference(result)
    print(visible(f"Wrote {folder / 'preference.json'}"))


def print_preference(result: dict[str, Any]) -> None:
    """Print win rates, strengths and agreement."""
    from rich.table import Table

    screen = console()
    rates = Table("", "against", "wins", "95 % interval", "ties", "pairs")
    for r in result["win_rates"]:
        low, high = r["interval"]
        cells = (f"{r['win_rate']:.3f}", f"{low:.3f} – {high:.3f}", str(r["ties"]), str(r["n"]))
        rates.add_row(r["method"], r["other"], *cells)
    strengths = Table("Bradley–Terry", "log-strength", "95 % interval")
    methods = result["bradley_terry"]["methods"]
    for name in sorted(methods, key=lambda name: -methods[name]["log_strength"]):
        low, high = methods[name]["interval"]
        interval = f"{low:+.3f} – {high:+.3f}"
        strengths.add_row(name, f"{methods[name]['log_strength']:+.3f}", interval)
    screen.print(rates, strengths)
    if result["bradley_terry"]["regularised"]:
        half = "half a win a side is added for every two methods"
        screen.print(f"Some method never won or never lost: {half}.")
    pairs, alpha = result["pairs"], result["krippendorff_alpha"]
    judged = f"{pairs['judged']} of {pairs['n']} pairs judged, {pairs['judged_by_several']}"
    screen.print(
        f"{len(result['annotators'])} annotators; {judged} by several; Krippendorff's alpha "
        f"{'–' if alpha is None else f'{alpha:.3f}'}",
        soft_wrap=True,
    )

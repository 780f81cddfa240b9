"""Pairs of texts for people to judge, blinded: how they are drawn and where they are written."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any

from dia_lightning.errors import UserError
from dia_lightning.files import json_lines, no_formula
from dia_lightning.terminal import visible

Run = list[dict[str, Any]]


def read_predictions(path: Path) -> Run:
    """The lines of a `predictions.jsonl`; UserError if it is missing or holds something else."""
    found = []
    for where, line in json_lines(path, "preference export"):
        if not all(isinstance(line.get(key), str) for key in ("prompt", "text", "method")):
            fields = "the fields prompt, text and method"
            raise UserError(f"preference export: {where} has no texts in {fields}")
        found.append(line)
    if not found:
        raise UserError(f"preference export: {path} holds no texts")
    return found


def method_names(paths: Sequence[Path], runs: Sequence[Run]) -> list[str]:
    """The methods of the runs; if two are equal, their folders; if those are too, the paths."""
    methods = [run[0]["method"] for run in runs]
    for names in (methods, [path.absolute().parent.name for path in paths]):
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def texts_by_prompt(run: Run) -> dict[tuple[str, int], str]:
    """Each text by its prompt, or `source`, and its number among this prompt's texts."""
    seen: Counter[str] = Counter()
    found = {}
    for line in run:
        prompt = line["prompt"] or line.get("source", "")
        found[prompt, seen[prompt]] = line["text"]
        seen[prompt] += 1
    return found


def draw_pairs(
    runs: dict[str, dict[tuple[str, int], str]], n: int, seed: int
) -> tuple[list[dict[str, str]], list[dict[str, Any]]]:
    """Draw equally many pairs of texts, n in all, for every two methods.

    Returns:
        The pairs in random order, with `pair_id`, `prompt`, `text_1`, `text_2`, `method_1` and
        `method_2`, each method on the left half of the time; and for every two methods the number
        of pairs, of matched prompts, and of prompts left out for identical texts.
    """
    draw = Random(seed)
    pairs, counts = [], []
    couples = list(combinations(runs, 2))
    for c, (a, b) in enumerate(couples):
        keys = [key for key in runs[a] if key in runs[b]]
        different = [key for key in keys if runs[a][key].strip() != runs[b][key].strip()]
        wanted = n // len(couples) + (c < n % len(couples))
        chosen = draw.sample(different, min(len(different), wanted))
        first = draw.randrange(2)
        for i, key in enumerate(chosen):
            left, right = (a, b) if (i + first) % 2 else (b, a)
            pair = {"prompt": key[0], "text_1": runs[left][key], "text_2": runs[right][key]}
            pairs.append({**pair, "method_1": left, "method_2": right})
        identical = len(keys) - len(different)
        count = {"methods": [a, b], "n": len(chosen), "identical": identical, "matched": len(keys)}
        counts.append(count)
    draw.shuffle(pairs)
    return [{"pair_id": _pair_id(i, seed, pair), **pair} for i, pair in enumerate(pairs)], counts


def _pair_id(i: int, seed: int, pair: dict[str, str]) -> str:
    """Differs between exports, which annotations must not mix; reveals no method.

    It begins with letters, since a spreadsheet would turn 12e4567890 into a number.
    """
    content = json.dumps([i, seed, pair["prompt"], pair["text_1"], pair["text_2"]])
    return f"pair-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def export_pairs(paths: Sequence[Path], out: Path, n: int, seed: int) -> None:
    """Write `annotators/` (Label Studio's tasks and configuration, a CSV file) and `key.json`.

    Raises:
        UserError: for fewer than two runs, runs without a common prompt, a folder with a key.
    """
    if len(paths) < 2:
        given = f"{len(paths)} file given, allowed: two predictions.jsonl or more"
        raise UserError(f"preference export: {given}")
    if n < 1:
        raise UserError(f"--n: {n} given, allowed: 1 or more pairs")
    if (out / "key.json").exists():
        fault = "holds an export already, whose key would be lost; give another folder"
        raise UserError(f"--out: {out} {fault}")
    runs = [read_predictions(path) for path in paths]
    names = method_names(paths, runs)
    pairs, counts = draw_pairs(dict(zip(names, map(texts_by_prompt, runs), strict=True)), n, seed)
    if not pairs:
        fault = "no pair of different texts for one prompt; the runs must share prompts"
        raise UserError(f"preference export: {fault}")
    key = {"schema": 1, "seed": seed, "methods": names, "files": [str(path) for path in paths]}
    try:
        _write(out, pairs, {**key, "drawn": counts})
    except OSError as error:
        raise UserError(f"--out: cannot write to {out} ({error.strerror})") from error
    for count in counts:
        both = visible(" and ".join(count["methods"]))
        drawn = f"{count['n']} pairs of {count['matched']} that match"
        print(f"{both}: {drawn}; {count['identical']} identical ones left out")
    where, secret = visible(str(out / "annotators")), visible(str(out / "key.json"))
    print(
        f"Wrote {len(pairs)} pairs to {where}: tasks.json with labelling_config.xml for Label "
        "Studio, or pairs.csv\n"
        f"(choice: 1, 2 or tie). Keep {secret} from the annotators: it says which text is whose."
    )


def _write(out: Path, pairs: list[dict[str, str]], key: dict[str, Any]) -> None:
    folder = out / "annotators"
    folder.mkdir(parents=True, exist_ok=True)
    shown = {"pair_id": "pair_id", "prompt": "prompt", "text_1": "answer1", "text_2": "answer2"}
    tasks = [{"data": {name: pair[key] for key, name in shown.items()}} for pair in pairs]
    _write_json(folder / "tasks.json", tasks)
    config = files(__package__) / "labelling_config.xml"
    (folder / "labelling_config.xml").write_bytes(config.read_bytes())
    # A spreadsheet may need the byte-order mark to read it as UTF-8.
    with (folder / "pairs.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, [*shown, "choice"], extrasaction="ignore")
        writer.writeheader()
        for pair in pairs:
            writer.writerow({name: no_formula(cell) for name, cell in pair.items()})
    sides = {pair["pair_id"]: [pair["method_1"], pair["method_2"]] for pair in pairs}
    _write_json(out / "key.json", {**key, "pairs": sides})


def _write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, ensure_ascii=False, indent=1)
    path.write_text(f"{text}\n", encoding="utf-8")

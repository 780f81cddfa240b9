"""`dia preference`: pairs of texts for people to judge, blinded, and what their choices say."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any

from dia_lightning.errors import UserError
from dia_lightning.files import json_lines, no_formula
from dia_lightning.reports.annotations import read_votes
from dia_lightning.settings.options import OptionParser
from dia_lightning.terminal import console, visible

# Label Studio's template "Human Preference collection for RLHF", with a box for ties, which its Pairwise tag cannot express.
LABELLING_CONFIG = """<View>
  <Header value="Which text is better?" />
  <Text name="prompt" value="$prompt" />
  <View style="display: flex; gap: 20px;">
    <Pairwise name="comparison" toName="answer1,answer2" selectionStyle="border: 2px solid #27ae60;" />
    <View style="flex: 1;"><Text name="answer1" value="$answer1" /></View>
    <View style="flex: 1;"><Text name="answer2" value="$answer2" /></View>
  </View>
  <Choices name="tie" toName="prompt" choice="single" showInline="true">
    <Choice value="tie" />
  </Choices>
</View>
"""
_EXPORT_HELP = """Draw pairs of texts that different runs have for the same prompt: the same number for every two runs, sides
at random. DIR/annotators is for those who judge: tasks.json and labelling_config.xml for Label Studio, or pairs.csv.
DIR/key.json, which says whose texts they are, is not."""
_IMPORT_HELP = """Read people's choices. Writes DIR/preference.json and prints win rates and Bradley-Terry strengths, both with
95 %% bootstrap intervals, and Krippendorff's alpha."""
_CSV_FIELDS = ("pair_id", "prompt", "text_1", "text_2", "choice")


def read_predictions(path: Path) -> list[dict[str, Any]]:
    """The lines of a `predictions.jsonl`.

    Raises:
        UserError: if the file is missing or holds something else.
    """
    found = []
    for where, line in json_lines(path, "preference export"):
        if not all(isinstance(line.get(key), str) for key in ("prompt", "text", "method")):
            fields = "the fields prompt, text and method"
            raise UserError(f"preference export: {where} has no texts in {fields}")
        found.append(line)
    if not found:
        raise UserError(f"preference export: {path} holds no texts")
    return found


def method_names(paths: Sequence[Path], runs: Sequence[Sequence[dict[str, Any]]]) -> list[str]:
    """Of each run its method; where two are equal, the folders of all, and where these are equal too, the paths."""
    for names in ([run[0]["method"] for run in runs], [path.absolute().parent.name for path in paths]):
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def texts_by_prompt(run: Sequence[dict[str, Any]]) -> dict[tuple[str, int], str]:
    """Each text under its prompt and its number among the texts of this prompt, by which texts of two runs are matched.

    Where the prompt is empty the text's `source` stands for it.
    """
    seen: Counter[str] = Counter()
    found = {}
    for line in run:
        prompt = line["prompt"] or line.get("source", "")
        found[prompt, seen[prompt]] = line["text"]
        seen[prompt] += 1
    return found


def draw_pairs(
    runs: dict[str, dict[tuple[str, int], str]], n: int, seed: int
) -> tuple[list[dict[str, str]], list[dict[str, Any]]]:  # fmt: skip
    """About n / (number of pairs of methods) pairs of texts for every two methods, each on the left half of the time.

    Returns:
        The pairs in random order, with `pair_id`, `prompt`, `text_1`, `text_2`, `method_1` and `method_2`; and for every two
        methods how many pairs there are, and how many prompts were left out since both texts are the same.
    """
    draw = Random(seed)
    pairs, counts = [], []
    couples = list(combinations(runs, 2))
    for c, (a, b) in enumerate(couples):
        keys = [key for key in runs[a] if key in runs[b]]
        different = [key for key in keys if runs[a][key].strip() != runs[b][key].strip()]
        chosen = draw.sample(different, min(len(different), n // len(couples) + (c < n % len(couples))))
        first = draw.randrange(2)
        for i, key in enumerate(chosen):
            left, right = (a, b) if (i + first) % 2 else (b, a)
            pairs.append(
                {"prompt": key[0], "text_1": runs[left][key], "text_2": runs[right][key], "method_1": left, "method_2": right}
            )
        counts.append({"methods": [a, b], "n": len(chosen), "identical": len(keys) - len(different), "matched": len(keys)})
    draw.shuffle(pairs)
    return [{"pair_id": _pair_id(i, seed, pair), **pair} for i, pair in enumerate(pairs)], counts


def _pair_id(i: int, seed: int, pair: dict[str, str]) -> str:
    """Differs between exports, so that annotations of another one are not taken for these; says nothing of the methods.

    It begins with letters, since a spreadsheet would turn 12e4567890 into a number.
    """
    content = json.dumps([i, seed, pair["prompt"], pair["text_1"], pair["text_2"]])
    return f"pair-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def export(paths: Sequence[Path], out: Path, n: int, seed: int) -> None:
    """Write `annotators/` (tasks for Label Studio, its labelling configuration, a CSV file) and `key.json` into `out`.

    Raises:
        UserError: for fewer than two runs, runs with no prompt in common, and a folder that has a key already.
    """
    if len(paths) < 2:
        raise UserError(f"preference export: {len(paths)} file given, allowed: two predictions.jsonl or more")
    if n < 1:
        raise UserError(f"--n: {n} given, allowed: 1 or more pairs")
    if (out / "key.json").exists():
        raise UserError(f"--out: {out} holds an export already, whose key would be lost; give another folder")
    runs = [read_predictions(path) for path in paths]
    names = method_names(paths, runs)
    pairs, counts = draw_pairs(dict(zip(names, map(texts_by_prompt, runs), strict=True)), n, seed)
    if not pairs:
        raise UserError("preference export: no pair of different texts for one prompt; the runs must share prompts")
    try:
        _write(
            out, pairs, {"schema": 1, "seed": seed, "methods": names, "files": [str(path) for path in paths], "drawn": counts}
        )
    except OSError as error:
        raise UserError(f"--out: cannot write to {out} ({error.strerror})") from error
    for count in counts:
        both = visible(" and ".join(count["methods"]))
        print(f"{both}: {count['n']} pairs of {count['matched']} that match; {count['identical']} identical ones left out")
    print(
        f"Wrote {len(pairs)} pairs to {visible(str(out / 'annotators'))}: tasks.json with labelling_config.xml for Label "
        "Studio, or pairs.csv"
    )
    print(visible(f"(choice: 1, 2 or tie). Keep {out / 'key.json'} from the annotators: it says which text is whose."))


def _write(out: Path, pairs: list[dict[str, str]], key: dict[str, Any]) -> None:
    folder = out / "annotators"
    folder.mkdir(parents=True, exist_ok=True)
    tasks = [
        {"data": {"pair_id": p["pair_id"], "prompt": p["prompt"], "answer1": p["text_1"], "answer2": p["text_2"]}}
        for p in pairs
    ]
    (folder / "tasks.json").write_text(json.dumps(tasks, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    (folder / "labelling_config.xml").write_text(LABELLING_CONFIG, encoding="utf-8")
    # With a byte-order mark, without which a spreadsheet may not read it as UTF-8.
    with (folder / "pairs.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, _CSV_FIELDS, extrasaction="ignore")
        writer.writeheader()
        rows = ({name: no_formula(cell) for name, cell in pair.items()} for pair in pairs)
        writer.writerows({**row, "choice": ""} for row in rows)
    sides = {pair["pair_id"]: [pair["method_1"], pair["method_2"]] for pair in pairs}
    (out / "key.json").write_text(json.dumps({**key, "pairs": sides}, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def summarise(key: dict[str, Any], votes: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Everything in `preference.json`, from the key and the choices by pair and annotator.

    A pair that several people judged counts once, by their majority; where they balance it is a tie.
    """
    from dia_lightning.reports.comparison import Outcome, compare, krippendorff_alpha, majority

    number = {method: i for i, method in enumerate(key["methods"])}
    outcomes = []
    for pair, (method_1, method_2) in key["pairs"].items():
        if votes.get(pair):
            score = majority([{"1": 1.0, "2": 0.0, "tie": 0.5}[choice] for choice in votes[pair].values()])
            i, j = number[method_1], number[method_2]
            outcomes.append(Outcome(i, j, score) if i < j else Outcome(j, i, 1 - score))
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
        "krippendorff_alpha": krippendorff_alpha([list(given.values()) for given in votes.values()]),
        # Sides are random: far from ½ means that people favour a side.
        "left_share": choices["1"] / decided if decided else None,
        **compare(outcomes, key["methods"]),
    }


def import_choices(folder: Path, files: Sequence[Path]) -> None:
    """Read people's choices, write `preference.json` into `folder` and print its tables.

    Raises:
        UserError: if `folder` holds no export, for a file that cannot be read, an unknown pair or a choice that is none.
    """
    path = folder / "key.json"
    try:
        key = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"preference import: {folder} holds no export of `dia preference export` ({error})") from error
    votes = read_votes(files, set(key["pairs"]))
    if not votes:
        counted = "controls comparison and tie, column choice"
        raise UserError(f"--annotations: no choice in these files ({counted})")
    result = summarise(key, votes)
    (folder / "preference.json").write_text(json.dumps(result, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    print_preference(result)
    print(visible(f"Wrote {folder / 'preference.json'}"))


def print_preference(result: dict[str, Any]) -> None:
    """Win rates, strengths and agreement as a person reads them on a screen."""
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
        strengths.add_row(name, f"{methods[name]['log_strength']:+.3f}", f"{low:+.3f} – {high:+.3f}")
    screen.print(rates, strengths)
    if result["bradley_terry"]["regularised"]:
        screen.print("Some method never won or never lost: half a win a side is added for every two methods.")
    pairs, alpha = result["pairs"], result["krippendorff_alpha"]
    screen.print(
        f"{len(result['annotators'])} annotators; {pairs['judged']} of {pairs['n']} pairs judged, {pairs['judged_by_several']} "
        f"by several; Krippendorff's alpha {'–' if alpha is None else f'{alpha:.3f}'}",
        soft_wrap=True,
    )


def options_parser() -> OptionParser:
    """Of `dia preference`."""
    parser = OptionParser(prog="dia preference", description="Let people judge pairs of texts, and read what they chose.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    out = commands.add_parser("export", help="blinded pairs of texts from two runs or more", description=_EXPORT_HELP)
    out.add_argument("predictions", nargs="+", type=Path, metavar="PREDICTIONS", help="predictions.jsonl of each run")
    out.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write to")
    out.add_argument("--n", type=int, default=100, help="pairs in all, spread over all pairs of methods (default: 100)")
    out.add_argument("--seed", type=int, default=0, help="of the choice of pairs and sides (default: 0)")
    read = commands.add_parser("import", help="people's choices: win rates and strengths", description=_IMPORT_HELP)
    read.add_argument("folder", type=Path, metavar="DIR", help="the folder that export wrote")
    read.add_argument(
        "--annotations", nargs="+", required=True, type=Path, metavar="FILE",
        help="Label Studio's JSON export, or filled pairs.csv (choice: 1, 2, tie or empty); annotator: the column of this "
        "name, else the file's name",
    )  # fmt: skip
    return parser


def run(arguments: Sequence[str]) -> None:
    """`dia preference` with these arguments; UserError for a mistake."""
    options = options_parser().parse_args(arguments)
    if options.command == "export":
        export(options.predictions, options.out, options.n, options.seed)
    else:
        import_choices(options.folder, options.annotations)

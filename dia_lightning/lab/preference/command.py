"""`dia preference`: pairs of texts for people to judge, blinded, and what their choices say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dia_lightning.settings.options import OptionParser

_EXPORT_HELP = """Draw pairs of texts that different runs have for the same prompt: the same number
for every two runs, sides at random. DIR/annotators is for those who judge: tasks.json and
labelling_config.xml for Label Studio, or pairs.csv. DIR/key.json, which says whose texts they are,
is not."""
_IMPORT_HELP = """Read people's choices. Writes DIR/preference.json and prints win rates and
Bradley-Terry strengths, both with 95 %% bootstrap intervals, and Krippendorff's alpha."""
_ANNOTATIONS_HELP = """Label Studio's JSON export, or filled pairs.csv (choice: 1, 2, tie or empty);
annotator: the column of this name, else the file's name"""


def preference_options() -> OptionParser:
    """Of `dia preference`."""
    about = "Let people judge pairs of texts, and read what they chose."
    parser = OptionParser(prog="dia preference", description=about)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    title = "blinded pairs of texts from two runs or more"
    add = commands.add_parser("export", help=title, description=_EXPORT_HELP).add_argument
    predictions = "predictions.jsonl of each run"
    add("predictions", nargs="+", type=Path, metavar="PREDICTIONS", help=predictions)
    add("--out", required=True, type=Path, metavar="DIR", help="folder to write to")
    number = "pairs in all, spread over all pairs of methods (default: 100)"
    add("--n", type=int, default=100, help=number)
    add("--seed", type=int, default=0, help="of the choice of pairs and sides (default: 0)")
    title = "people's choices: win rates and strengths"
    add = commands.add_parser("import", help=title, description=_IMPORT_HELP).add_argument
    add("folder", type=Path, metavar="DIR", help="the folder that export wrote")
    annotations = _ANNOTATIONS_HELP
    add("--annotations", nargs="+", required=True, type=Path, metavar="FILE", help=annotations)
    return parser


def run_preference(arguments: Sequence[str]) -> None:
    """`dia preference` with these arguments; UserError for a mistake."""
    options = preference_options().parse_args(arguments)
    if options.command == "export":
        from dia_lightning.lab.preference.pairs import export_pairs

        export_pairs(options.predictions, options.out, options.n, options.seed)
    else:
        from dia_lightning.lab.preference.results import import_choices

        import_choices(options.folder, options.annotations)

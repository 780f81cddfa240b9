"""`lightning kit`: put a sampler's settings and networks into one folder to share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dia_lightning.settings.options import OptionParser
from dia_lightning.terminal import visible

_HELP = """Put denoiser and critic, the settings that use them and a model card into one folder of safetensors and YAML.
The folder can be moved, copied and uploaded; `lightning predict --config DIR` samples from it wherever it lies, and
`--config hub:USER/REPO` from the hub."""


def run(arguments: Sequence[str]) -> None:
    """`lightning kit` with these arguments; UserError for a mistake."""
    options = options_parser().parse_args(arguments)
    from dia_lightning.kit.export import export

    kit = export(
        options.config, options.out, options.weights == "bf16", options.with_base_lm, options.run, options.license,
        options.overwrite, options.allow,
    )  # fmt: skip
    size = sum(part.size for part in kit.parts) / 2**20
    parts = ", ".join(part.name for part in kit.parts)
    lines = [f"Wrote {options.out}: {parts} ({size:.1f} MiB), dia.yaml and README.md, its card."]
    lines += [f"Not in the kit: {option}, which was {value}." for option, value in kit.left.items()]
    lines += [f"Not in the kit: {name}, whose code has to be where the kit is used." for name in kit.foreign]
    if not kit.has_lm:
        lines.append(f"Not in the kit: the base model {kit.module.base_lm} (--with-base-lm puts it there).")
    lines.append(f"Use it:   lightning predict --config {options.out}{kit.allow}")
    lines.append(
        f"Share it: hf upload USER/{kit.name} {options.out}   and then   lightning predict --config hub:USER/{kit.name}"
    )
    print(visible("\n".join(lines)))


def options_parser() -> OptionParser:
    """Of `lightning kit`."""
    parser = OptionParser(prog="dia kit", description="Share what samples: networks, settings and their card in one folder.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    out = commands.add_parser("export", help="write a kit from a sampler's settings", description=_HELP)
    out.add_argument(
        "--config", required=True, metavar="FILE", help="the sampler's settings, for example configs/dia_tiny.yaml or the "
        "config.yaml of a run",
    )  # fmt: skip
    out.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write; its name is the kit's")
    out.add_argument(
        "--weights", choices=("stored", "bf16"), default="stored", help="matrices of denoiser and critic as they are "
        "stored, or rounded to bfloat16, half of float32's size; the base model is never rounded (default: stored)",
    )  # fmt: skip
    out.add_argument("--with-base-lm", action="store_true", help="copy the base model too; else the settings name it")
    out.add_argument("--run", type=Path, metavar="DIR", help="a finished run of these settings, for the card's figures")
    out.add_argument("--license", metavar="ID", help="licence of the kit, as the hub calls it, for example apache-2.0")
    out.add_allow()
    out.add_argument("--overwrite", action="store_true", help="replace the kit in DIR")
    return parser

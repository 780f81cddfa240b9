"""`lightning kit`: put a sampler's settings and networks into one folder to share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dia_lightning.settings.options import OptionParser
from dia_lightning.terminal import visible

_HELP = """Put denoiser and critic, the settings that use them and a model card into one folder of
safetensors and YAML. The folder can be moved, copied and uploaded; `lightning predict --config DIR`
samples from it wherever it lies, and `--config hub:USER/REPO` from the hub."""


def run_kit(arguments: Sequence[str]) -> None:
    """`lightning kit` with these arguments; UserError for a mistake."""
    options = kit_options().parse_args(arguments)
    from dia_lightning.lab.kit.export import export

    kit = export(
        options.config,
        options.out,
        bf16=options.weights == "bf16",
        with_base_lm=options.with_base_lm,
        run=options.run,
        license=options.license,
        overwrite=options.overwrite,
        allow=options.allow,
    )
    size = sum(part.size for part in kit.parts) / 2**20
    parts = ", ".join(part.name for part in kit.parts)
    absent = [f"{option}, which was {value}" for option, value in kit.left.items()]
    absent += [f"{name}, whose code has to be where the kit is used" for name in kit.foreign]
    if not kit.has_lm:
        absent.append(f"the base model {kit.module.base_lm} (--with-base-lm puts it there)")
    use = "lightning predict --config"
    lines = [
        f"Wrote {options.out}: {parts} ({size:.1f} MiB), dia.yaml and README.md, its card.",
        *(f"Not in the kit: {what}." for what in absent),
        f"Use it:   {use} {options.out}{kit.allow}",
        f"Share it: hf upload USER/{kit.name} {options.out}   and then   {use} hub:USER/{kit.name}",
    ]
    print(visible("\n".join(lines)))


def kit_options() -> OptionParser:
    """Of `lightning kit`."""
    about = "Share what samples: networks, settings and their card in one folder."
    parser = OptionParser(prog="dia kit", description=about)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    title = "write a kit from a sampler's settings"
    out = commands.add_parser("export", help=title, description=_HELP)
    add = out.add_argument
    settings = "the sampler's settings, for example configs/dia_tiny.yaml or a run's config.yaml"
    add("--config", required=True, metavar="FILE", help=settings)
    folder = "folder to write; its name is the kit's"
    add("--out", required=True, type=Path, metavar="DIR", help=folder)
    weights = (
        "matrices of denoiser and critic as they are stored, or rounded to bfloat16, half of "
        "float32's size; the base model is never rounded (default: stored)"
    )
    add("--weights", choices=("stored", "bf16"), default="stored", help=weights)
    copied = "copy the base model too; else the settings name it"
    add("--with-base-lm", action="store_true", help=copied)
    figures = "a finished run of these settings, for the card's figures"
    add("--run", type=Path, metavar="DIR", help=figures)
    licence = "licence of the kit, as the hub calls it, for example apache-2.0"
    add("--license", metavar="ID", help=licence)
    out.add_allow()
    add("--overwrite", action="store_true", help="replace the kit in DIR")
    return parser

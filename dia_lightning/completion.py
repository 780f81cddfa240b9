"""`lightning completion SHELL`: a script by which a shell completes commands, options and the names of parts."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from dia_lightning.resources import OptionParser, UserError

_HELP = """Print a script by which SHELL completes commands, options and what some of them allow. For this session of bash:
    eval "$(lightning completion bash)"
For all of them, keep what it prints where your shell looks: ~/.local/share/bash-completion/completions/lightning, or a file
_lightning in a folder of zsh's $fpath. Needs the package shtab (pip install 'dia-lightning[completion]')."""


def run(arguments: Sequence[str], commands: Mapping[str, str]) -> None:
    """`lightning completion` with these arguments; UserError for a mistake.

    Args:
        commands: every command of `lightning` with a line about it.
    """
    shell = options_parser().parse_args(arguments).shell
    if find_spec("shtab") is None:
        raise UserError("completion: the package shtab is missing: pip install 'dia-lightning[completion]'")
    import shtab

    print(shtab.complete(every_command(commands), shell))


def options_parser() -> OptionParser:
    """Of `lightning completion`."""
    parser = OptionParser(prog="dia completion", description=_HELP, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    return parser


def every_command(commands: Mapping[str, str]) -> argparse.ArgumentParser:
    """What is completed: each command's options, short as in `--model.lam`, those of its usual classes."""
    import lightning as L

    from dia_lightning.critic import CriticModule
    from dia_lightning.data import ModelSamples, PromptData
    from dia_lightning.diffusion import DenoiserModule
    from dia_lightning.kit import command as kit
    from dia_lightning.reports import preference
    from dia_lightning.samplers import GuidedSamplerModule
    from dia_lightning.study import command as study

    parser = OptionParser(prog="lightning")
    parser.add_argument("--version", action="store_true")
    parsers = parser.add_subparsers(metavar="COMMAND")
    tools = {"kit": kit, "study": study, "preference": preference}
    known = {name: tool.options_parser() for name, tool in tools.items()} | {"completion": options_parser()}
    for name, title in commands.items():
        command = parsers.add_parser(name, help=title)
        if name in known:
            parsers.choices[name] = known[name]
        else:
            samples = name in ("test", "predict")
            _add_file(command, "-c", "--config", help="settings")
            command.add_allow()
            command.add_argument("--print_config", action="store_true", help="every setting, as a YAML file")
            _add_file(command, "--ckpt_path", help="weights to go on from")
            _add_file(command, "--trainer.callbacks.folder", help="where files go")
            _add_options(command, "model", *([GuidedSamplerModule] if samples else [DenoiserModule, CriticModule]))
            _add_options(command, "data", PromptData if samples else ModelSamples)
            _add_options(command, "trainer", L.Trainer)
    return parser


def _add_file(parser: argparse.ArgumentParser, *names: str, **more: Any) -> None:
    import shtab

    parser.add_argument(*names, **more).complete = shtab.FILE  # type: ignore[attr-defined]


def _add_options(parser: argparse.ArgumentParser, part: str, *classes: type) -> None:
    """An option for each argument of the constructors; of a flag the two values."""
    from dia_lightning.samplers import Sampler

    known = {"--model.sampler": sorted(kind.__name__ for kind in Sampler.__subclasses__())}
    arguments = {name: given for cls in classes for name, given in inspect.signature(cls).parameters.items()}
    for name, given in arguments.items():
        option = f"--{part}.{name}"
        choices = ["true", "false"] if isinstance(given.default, bool) else known.get(option)
        if name == "prompts" or "/" in str(given.default):
            _add_file(parser, option)
        else:
            parser.add_argument(option, choices=choices)

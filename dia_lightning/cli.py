"""The `lightning` command (second name: `dia`): fit, validate, test and predict from a YAML file."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from typing import Any, NoReturn

import lightning as L
from jsonargparse._actions import ActionConfigFile
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from dia_lightning.resources import UserError, require_path

_DEFAULT_PREDICT = "configs/dia_tiny.yaml"
_CONFIG_OPTIONS = ("--config", "-c")
_IGNORED = (
    "num_workers", r"isinstance\(treespec", "litlogger", "logging interval", "args parameter is intended",
    "Precision bf16-mixed is not",
)  # fmt: skip


class _Parser(LightningArgumentParser):
    """Ends a parsing error as a `UserError` of one line instead of usage text and nested Union messages."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # type: ignore[override]
        raise UserError(_one_line(message)) from (ex or sys.exc_info()[1])


def _one_line(message: str) -> str:
    """The part of a jsonargparse message that says what was wrong, without the failed branches of a Union."""
    noise = re.compile(
        r"^(Does not validate against any of the Union|Subtypes:|Errors:|Given value type:|Given value:|"
        r"- Expected a <class 'NoneType'>|tip:|usage:)"
    )
    lines = [line.strip() for line in message.splitlines()]
    return " ".join(line.removeprefix("- ") for line in lines if line and not noise.match(line))[:500]


class DiaCLI(LightningCLI):
    """LightningCLI whose settings come from files and the command line only, never from a checkpoint."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        kwargs.setdefault("dump_header", [f"lightning.pytorch=={L.__version__}"])
        parser = _Parser(**kwargs)
        parser.add_argument("-c", "--config", action=ActionConfigFile, help="YAML file of the run; may be given several times.")
        return parser

    def _parse_ckpt_path(self) -> None:
        """Weights come from `--ckpt_path`, settings do not: a checkpoint must not silently overrule what was asked for."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {name: skip for name, skip in LightningCLI.subcommands().items() if name in _HELP}


_HELP = {
    "fit": "train a base model, a denoiser or a critic",
    "validate": "measure a trained module on held-out data",
    "test": "evaluate a sampler on prompts",
    "predict": "sample texts; with no argument, aligned texts from the shipped kit",
}


def prepare_arguments(arguments: list[str]) -> list[str]:
    """Find config files also among the shipped ones, and give `predict` its default when no file is named.

    Raises:
        UserError: for a config file that exists nowhere.
    """
    out, named = [], False
    rest = iter(arguments)
    for argument in rest:
        option, _, value = argument.partition("=")
        if option in _CONFIG_OPTIONS:
            named = True
            out += [option, str(require_path(value or next(rest, ""), option))]
        else:
            out.append(argument)
    if "predict" in out[:1] and not named and not {"-h", "--help"} & set(out):
        out[1:1] = ["--config", str(require_path(_DEFAULT_PREDICT, "--config"))]
    return out


def _quiet() -> None:
    """Keep what a user can act on: no advertising tips, no progress bars for loading a few weights."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    for message in _IGNORED:
        warnings.filterwarnings("ignore", message=f".*{message}.*")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.trainer.setup"):
        logging.getLogger(name).addFilter(lambda record: "Tip:" not in record.getMessage())


def _root_user_error(error: BaseException | None) -> UserError | None:
    """The innermost `UserError` among an exception and its causes."""
    found = None
    while error is not None:
        found = error if isinstance(error, UserError) else found
        error = error.__cause__ or error.__context__
    return found


def run(arguments: list[str]) -> None:
    """Parse and run; raises instead of exiting."""
    DiaCLI(
        L.LightningModule,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={"default_root_dir": "runs"},
        parser_kwargs={"parser_mode": "omegaconf+"},
        args=prepare_arguments(arguments),
    )


def main() -> None:
    """Entry point of the scripts: exit code 2 and one line for a user's mistake, 1 for a bug, 130 for Ctrl-C."""
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    debug = "--debug" in sys.argv[1:]
    _quiet()
    try:
        run(arguments)
    except KeyboardInterrupt:
        print("interrupted; finished work is kept, the same command goes on from there", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        user_error = _root_user_error(error)
        if user_error is not None:
            print(f"error: {user_error}", file=sys.stderr)
            sys.exit(2)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"internal error: {type(error).__name__}: {reason} (run again with --debug for the traceback)", file=sys.stderr)
        sys.exit(1)

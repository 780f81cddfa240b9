"""DiaCLI: LightningCLI with settings from files and the command line only, and mistakes found
before work begins.
"""

from __future__ import annotations

import errno
import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from operator import or_
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NoReturn, get_args

import lightning as L
from jsonargparse import Namespace, set_parsing_settings
from jsonargparse._actions import ActionConfigFile
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser
from omegaconf.errors import OmegaConfBaseException

from dia_lightning.diffusion.checkpoint import load_checkpoint
from dia_lightning.distributed import one_fit, one_for_all, refuse_lone
from dia_lightning.errors import INTERRUPTS, UserError, root_user_error
from dia_lightning.files import placed
from dia_lightning.settings.building import BuildingCLI, as_stated, is_above, leaves, spelled_out
from dia_lightning.settings.messages import TRUSTED, explain, refuse_lost, typed_option
from dia_lightning.settings.once import TRAINER_DEFAULTS, share_base_lm, share_folder
from dia_lightning.settings.options import NEGATIVE
from dia_lightning.settings.places import class_of
from dia_lightning.settings.quiet import quiet
from dia_lightning.settings.short import as_typed, expand

# A disk or a quota that is full, or a limit on a file's size.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_TEXT = "a text that has ${ in it belongs into a file, as in --data.prompts FILE"
# Modules of the user's that an earlier call in this process allowed: jsonargparse's settings can
# only be added to.
_named_before: set[str] = set()
# What each command needs of the module (one of these) and of the data, and a file that has it.
_NEEDS = {
    "fit": (("training_step",), "train_dataloader", "configs/ddpm_tiny.yaml"),
    "validate": (("validation_step",), "val_dataloader", "configs/ddpm_tiny.yaml"),
    "test": (("test_step",), "test_dataloader", "configs/dia_tiny.yaml"),
    "predict": (("predict_step", "forward"), "predict_dataloader", "configs/dia_tiny.yaml"),
}


class _ParsingError(Exception):
    """What jsonargparse says, before it is explained."""

    def __init__(
        self, message: str, error: BaseException | None, parser: LightningArgumentParser
    ) -> None:
        super().__init__(message)
        self.error, self.parser = error, parser


class _Parser(LightningArgumentParser):
    """Raises instead of printing usage text; parsers of a single class still raise what
    jsonargparse expects of them.

    An abbreviation of an option is none.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})
        self._negative_number_matcher = NEGATIVE

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # type: ignore[override]
        if not self.exit_on_error:
            super().error(message, ex)
        if (mistake := root_user_error(ex)) is not None:
            raise mistake
        raise _ParsingError(message, ex, self) from ex

    def get_defaults(self, *args: Any, **kwargs: Any) -> Namespace:
        """A part that takes the place of a default one has its own defaults, not that one's."""
        found = super().get_defaults(*args, **kwargs)
        for option, value in vars(found).items():
            found[option] = as_stated(value)
        return found

    def dump(self, cfg: Namespace, *args: Any, **kwargs: Any) -> str:
        return str(super().dump(spelled_out(cfg), *args, **kwargs))

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Namespace:
        """`{here}` in a file is the file's own folder."""
        found: Namespace = placed(
            super().parse_path(path, *args, **kwargs), Path(path).absolute().parent
        )
        for option, value in leaves("", found):
            _refuse_escape(f"{option} (in {path})", value)
        return found


class DiaCLI(BuildingCLI):
    """LightningCLI whose settings come from files and the command line only, never from a
    checkpoint.
    """

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        kwargs.setdefault("dump_header", [f"lightning.pytorch=={L.__version__}"])
        parser = _Parser(**kwargs)
        parser.add_argument(
            "-c",
            "--config",
            action=ActionConfigFile,
            help="YAML file of the run; may be given several times.",
        )
        return parser

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser.add_argument(
            "--out",
            type=str | None,  # type: ignore[arg-type]
            help=f"Folder of all that the run writes; runs/{subcommand} by default.",
        )
        defaults = TRAINER_DEFAULTS.get(subcommand, {})
        parser.set_defaults({f"trainer.{name}": value for name, value in defaults.items()})
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Of an option that is an int or a float, try the int first.

        `typing` hands out whichever order of a union was made first in the process. Where that is
        floats first, by what
        other packages do, `limit_predict_batches: 1` would be read as 1.0, which is all of them.
        """
        action: Any
        for action in parser._actions:
            kinds = get_args(getattr(action, "_typehint", None))
            if {int, float} <= set(kinds):
                others = [kind for kind in kinds if kind not in (int, float)]
                action._typehint = reduce(or_, [int, float, *others])

    def _parse_ckpt_path(self) -> None:
        """Weights come from `--ckpt_path`, settings do not: a checkpoint must not silently
        overrule what was asked for.
        """

    def before_instantiate_classes(self) -> None:
        """Find what would fail only after minutes of loading or sampling."""
        config = spelled_out(self.config[self.subcommand])
        steps, loader, example = _NEEDS[str(self.subcommand)]
        for option, base, names in (
            ("model", L.LightningModule, steps),
            ("data", L.LightningDataModule, (loader,)),
        ):
            cls = class_of(config[option])
            if inspect.isclass(cls) and all(
                getattr(cls, name, None) is getattr(base, name, None) for name in names
            ):
                raise UserError(
                    f"--{option}: {cls.__name__} given, {self.subcommand} needs a class with"
                    f" {' or '.join(names)}; see for example --config {example}"
                )
        share_base_lm(config, self._arguments)
        share_folder(config, str(self.subcommand), self._arguments)
        _check_checkpoint(str(config.get("ckpt_path") or "best"))
        if config.get("weights_only") is False:
            raise UserError(
                "--weights_only: false given, allowed: true; a pickle of more than weights could"
                " run code"
            )
        config["weights_only"] = True
        self._check_seed(config)

    def _check_seed(self, config: Namespace) -> None:
        """Samplers have a seed of their own, so that `seed_everything` alone would change no
        text.
        """
        seed, own = (
            config.get("seed_everything"),
            (config["model"].get("init_args") or {}).get("seed"),
        )
        option, given = typed_option(["seed_everything"], self._arguments)
        samples = self.subcommand in ("test", "predict") and type(own) is int
        # 0 in a file is what every shipped one says.
        if samples and seed is not False and seed != own and (given or seed != 0):
            shown = seed if type(seed) is int else "N"
            raise UserError(
                f"{option}: {given or seed} given, which the texts of `{self.subcommand}` do not"
                f" depend on; use --model.seed {shown} (it is {own} now)"
            )

    def instantiate_classes(self) -> None:
        with self.placing(), self.building():
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        with self._mistakes_of_the_trainer():
            try:
                trainer = super().instantiate_trainer(**kwargs)
            except (MisconfigurationException, OSError):
                raise
            except Exception as error:
                twice = "more than one stateful callback" in str(error)
                raise UserError(f"--trainer{'.callbacks' * twice}: {error}") from error
        refuse_lone(trainer)
        if INTERRUPTS.watching:
            # Lightning's own notes SIGTERM and goes on to the end of the batch, and asks the other
            # processes meanwhile.
            trainer._signal_connector._sigterm_notifier_fn = INTERRUPTS.terminate  # type: ignore
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        alone = one_fit(self.trainer, subcommand)
        together = one_for_all(self.trainer)
        with self.placing(), self._mistakes_of_the_trainer(), alone, together, self.building():
            super()._run_subcommand(subcommand)

    @contextmanager
    def _mistakes_of_the_trainer(self) -> Iterator[None]:
        """Turn the Trainer's exceptions that a user can mend into `UserError`."""
        try:
            yield
        except MisconfigurationException as error:
            raise UserError(f"--trainer: {error}") from error
        except OSError as error:
            options = leaves("", self.config[self.subcommand])
            above = [
                (len(str(value)), name == "--out", name)
                for name, value in options
                if is_above(value, error)
            ]
            if not above and error.errno not in _FULL:
                raise
            named = max(above)[2] if above else "--out"
            option = typed_option(named.removeprefix("--").split("."), self._arguments)[0]
            kept = "; what is finished is kept" if error.errno in _FULL else ""
            raise UserError(
                f"{option}: {error.filename or 'cannot write'}: {error.strerror}{kept}"
            ) from error
        except UnpicklingError as error:  # of a checkpoint that the trainer found itself
            raise UserError(
                "--ckpt_path: a pickle of more than weights and plain values, which could run code"
            ) from error
        except RuntimeError as error:
            path = self.config[self.subcommand].get("ckpt_path")
            if path is None or "loading state_dict" not in str(error):
                raise
            reason = str(error).splitlines()[-1].strip()
            raise UserError(
                f"--ckpt_path: {path} does not fit the model ({reason[:160]})"
            ) from error


class _OptionsOnly(DiaCLI):
    """Reads and checks the options; builds and runs nothing."""

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


class _ModelOnly(_OptionsOnly):
    """Builds the module, and no trainer: the options may ask for devices that are elsewhere."""

    def instantiate_classes(self) -> None:
        with self.placing(), self.building():
            self.model = self._get(self.parser.instantiate_classes(self.config), "model")


def _check_checkpoint(path: str) -> None:
    if path in ("best", "last", "hpc", "registry") or "://" in path:
        return
    if not Path(path).exists():
        raise UserError(f"--ckpt_path: no such file: {path}")
    if Path(path).is_dir():
        raise UserError(f"--ckpt_path: {path} is a folder, a .ckpt file is needed")
    try:
        load_checkpoint(Path(path))
    except ValueError as error:
        raise UserError(
            f"--ckpt_path: {path} is no checkpoint, or it is damaged ({error})"
        ) from error


def _refuse_escape(option: str, value: Any) -> None:
    """jsonargparse rewrites what is between the braces also where a backslash says that it
    stands for itself.
    """
    if isinstance(value, str) and "\\${" in value:
        raise UserError(f"{option}: \\${{ given, which cannot be read; {_NO_TEXT}")


def run(arguments: list[str], options_only: bool = False, allow: Sequence[str] = ()) -> None:
    """Parse and run, or parse only; raises instead of exiting.

    Args:
        allow: modules of the user's that options may name classes and functions of, besides those
            of `TRUSTED`.

    Raises:
        UserError: for a mistake in the options, in one line; for a name of another module before
            that is imported.
    """
    _called(_OptionsOnly if options_only else DiaCLI, arguments, allow)


def build_model(arguments: list[str], allow: Sequence[str] = ()) -> L.LightningModule:
    """The module that a command with these arguments would run; `allow` and UserError as for
    `run`.
    """
    return _called(_ModelOnly, arguments, allow).model


def options_of(arguments: list[str], allow: Sequence[str] = ()) -> Namespace:
    """Every setting that a command with these arguments would have, defaults too; `allow` and
    UserError as for `run`.
    """
    cli = _called(_OptionsOnly, arguments, allow)
    found: Namespace = cli.config[cli.subcommand]
    return found


def _called(cli: type[DiaCLI], arguments: list[str], allow: Sequence[str]) -> DiaCLI:
    given, arguments = arguments, expand(arguments)
    quiet()
    _allow_only([*TRUSTED, *allow])
    # `${}` is resolved after the command line, and from the top of the file although the settings
    # stand under the command.
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    mode = {"parser_mode": "omegaconf+"}
    # A command's parser takes half a second to build: of the one that is called alone.
    called = [name for name in arguments if name in _NEEDS][:1] or [*_NEEDS]
    commands = {name: cli.subcommands()[name] for name in called}
    one = type(cli.__name__, (cli,), {"subcommands": staticmethod(lambda: commands)})
    try:
        refuse_lost(arguments)
        for before, argument in zip(["", *arguments], arguments, strict=False):
            option = argument.partition("=")[0] if argument.startswith("--") else before
            _refuse_escape(option, argument)
        return one(
            L.LightningModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"prog": "lightning", **mode, **dict.fromkeys(commands, mode)},
            args=arguments,
        )
    except _ParsingError as failed:
        known = _option_names(failed.parser, arguments)
        message = explain(str(failed), failed.error, arguments, known)
        raise UserError(as_typed(message, given)) from failed
    except UserError as error:
        error.args = (as_typed(str(error), given),)
        raise
    except OmegaConfBaseException as error:
        path = re.sub(r"\[\d+\]", "", str(error.full_key or "")).split(".")[1:]
        option = typed_option(path, arguments)[0] if path else "--config"
        reason = re.sub(
            r"(?<=key .)\.+| \(resolved to .*", "", str(error.msg or error).splitlines()[0]
        )
        message = f"{option}: {reason}; ${{…}} stands for another setting, {_NO_TEXT}"
        raise UserError(as_typed(message, given)) from error


def _allow_only(modules: list[str]) -> None:
    """Let options name what these modules hold and nothing else; another's name is refused
    before it is imported.
    """
    _named_before.update(modules)
    allowed = {
        name
        for name in _named_before
        if any(f"{name}.".startswith(f"{module}.") for module in modules)
    }
    set_parsing_settings(
        import_path_denylist=["*", *_named_before],
        import_path_allowlist=[*allowed],
        instantiate_subclass_spec_in_any=False,
    )


def _option_names(parser: LightningArgumentParser, arguments: list[str]) -> list[str]:
    """Every option of the command that was called."""
    commands = getattr(parser, "_subcommands_action", None)
    if commands is not None and arguments and arguments[0] in commands.choices:
        parser = commands.choices[arguments[0]]
    return list(parser._option_string_actions)

"""The argument parser of the small commands."""

from __future__ import annotations

import argparse
import re
from typing import Any, NoReturn

from dia_lightning.errors import UserError

# An argument that is a value although it begins with "-"; argparse before Python 3.14 knows no
# exponent.
NEGATIVE = re.compile(r"-(\.?\d|\.?inf\b|\.?nan\b)", re.IGNORECASE)


class _Allow(argparse.Action):
    """Adds a module's name to a list; argparse would reword the UserError of a `type`."""

    def __call__(self, parser: Any, namespace: Any, value: Any, option: Any = None) -> None:
        setattr(namespace, self.dest, [*getattr(namespace, self.dest), module_name(value)])


class OptionParser(argparse.ArgumentParser):
    """Raises `UserError` where a command is called wrongly; an abbreviation of an option is
    none.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})
        self._negative_number_matcher = NEGATIVE

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog.partition(' ')[2]}: {message} (see `{self.prog} --help`)")

    def add_allow(self) -> None:
        """`--allow MODULE`, as for `parser.run`; a list."""
        self.add_argument(
            "--allow", action=_Allow, default=[], metavar="MODULE",
            help="let options name classes of a module of yours; may be given several times",
        )  # fmt: skip


def module_name(text: str) -> str:
    """`text`, if it can be the name of a module, as `--allow` wants it.

    Raises:
        UserError: if it cannot, or it is the one that decides what is allowed.
    """
    if (
        not all(part.isidentifier() for part in text.split("."))
        or text.partition(".")[0] == "jsonargparse"
    ):
        raise UserError(
            f"--allow: {text or 'nothing'} given, allowed: the name of your module, as in --allow"
            " my_rewards"
        )
    return text

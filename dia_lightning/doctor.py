"""`make doctor`: which package owns the script `lightning`, and what is installed."""

from __future__ import annotations

import sys
from importlib.metadata import distributions, version

_OURS = "dia-lightning"
_SHOWN = ("torch", "lightning", "transformers", "torchmetrics", "jsonargparse", "omegaconf")


def script_owners(name: str) -> list[str]:
    """Names of the installed distributions that have a console script called `name`."""
    found = {
        dist.metadata["Name"] for dist in distributions() for entry in dist.entry_points
        if entry.group == "console_scripts" and entry.name == name
    }  # fmt: skip
    return sorted(found)


def main() -> int:
    """Print the report; 1 if another package claims the script too."""
    for package in (_OURS, *_SHOWN):
        print(f"{package:16} {version(package)}")
    owners = script_owners("lightning")
    print(f"script lightning claimed by: {', '.join(owners) or 'nobody'}")
    others = [owner for owner in owners if owner != _OURS]
    if others:
        print(f"mend: {sys.executable} -m pip install --force-reinstall --no-deps {_OURS}   (or use `dia`, the same program)")
    return int(bool(others))


if __name__ == "__main__":
    sys.exit(main())

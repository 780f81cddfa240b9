"""`make doctor`: which package owns the script `lightning`, and the installed versions."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

from dia_lightning.terminal import visible

_OURS = "dia-lightning"
_SHOWN = ("torch", "lightning", "transformers", "torchmetrics", "jsonargparse", "omegaconf")


def script_owners(name: str) -> list[str]:
    """Names of the installed distributions that have a console script called `name`."""
    found = {
        dist.metadata["Name"]
        for dist in distributions()
        if dist.entry_points.select(group="console_scripts", name=name)
    }
    return sorted(found)


def script_state(script: Path) -> str:
    """`ours`, `another's` or `missing`.

    The last package installed writes the file, and the first removed deletes it.
    """
    if not script.is_file():
        return "missing"
    return "ours" if b"dia_lightning" in script.read_bytes() else "another's"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def diagnose() -> int:
    """Print the report; 1 if the script is not ours, or another package claims it too."""
    for package in (_OURS, *_SHOWN):
        print(f"{package:16} {_version(package)}")
    owners = script_owners("lightning")
    print(visible(f"script lightning claimed by: {', '.join(owners) or 'nobody'}"))
    script = Path(sys.executable).parent / "lightning"
    state = script_state(script)
    print(f"script {script}: {state}")
    wrong = state != "ours" or any(owner != _OURS for owner in owners)
    if wrong:
        root = Path(__file__).resolve().parents[2]
        editable = (root / "pyproject.toml").is_file()
        source = f"--editable {root}" if editable else "THE_WHEEL_OF_THIS_PACKAGE"
        mend = f"{sys.executable} -m pip install --force-reinstall --no-deps {source}"
        print(f"mend: {mend}   (or use `dia`, the same program)")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(diagnose())

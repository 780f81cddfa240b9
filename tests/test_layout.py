"""Data flows in one direction: a file imports only from its left."""

import ast
import re
from pathlib import Path

import dia_lightning

ORDER = [
    "errors", "files", "terminal", "progress", "numerics", "types", "words", "meter", "lm",
    "rewards", "target", "data", "diffusion", "guidance", "sampling", "samplers", "testing",
    "training", "metrics", "callbacks", "front", "distributed", "settings", "lab", "cli",
    "__main__",
]  # fmt: skip
# `lightning test` ends in a report; the laboratory is imported only then.
LATE = {("writer.py", "dia_lightning.lab.report.run")}
PACKAGE = Path(dia_lightning.__file__).parent


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def test_imports_point_left() -> None:
    wrong = []
    for file in PACKAGE.rglob("*.py"):
        own = file.relative_to(PACKAGE).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                if (file.name, name) in LATE and node.col_offset > 0:
                    continue
                if (
                    name.startswith("dia_lightning.")
                    and own != "__init__"
                    and ORDER.index(part_of(name)) > ORDER.index(own)
                ):
                    wrong.append(f"{file.name} imports {name}")
    assert not wrong


def test_files_and_functions_stay_small() -> None:
    for file in PACKAGE.rglob("*.py"):
        source = file.read_text(encoding="utf-8")
        assert source.count("\n") <= 400, file
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno < 70, f"{file.name}: {node.name}"


# The command line, and the laboratory.
MAY_NAME_OPTIONS = (
    "settings", "cli.py", "lab",
)  # fmt: skip


def test_the_library_knows_no_command_line() -> None:
    """Messages name arguments; `settings.places` finds their options."""
    option = re.compile(r"--(model|data|trainer)\b")
    wrong = []
    for file in PACKAGE.rglob("*.py"):
        name = file.relative_to(PACKAGE).as_posix()
        if name.startswith(MAY_NAME_OPTIONS):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            said = node.value if isinstance(node, ast.Constant) else None
            if isinstance(said, str) and option.search(said):
                wrong.append(f"{name}, line {node.lineno}: {said:.60}")
    assert not wrong

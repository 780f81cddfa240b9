"""Data flows in one direction: a file imports only from its left."""

import ast
import re
from collections import Counter
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


def budgets() -> dict[str, int]:
    """Folder and most lines, from the table of docs/architecture.md."""
    text = (PACKAGE.parent / "docs/architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w/]+)` \| .* \| ([\d,]+) \|$", text, re.MULTILINE)
    return {folder: int(lines.replace(",", "")) for folder, lines in rows}


def test_folders_keep_to_their_budgets() -> None:
    """At most the lines that docs/architecture.md says, and it says at most a tenth too many."""
    counted: Counter[str] = Counter()
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).parts
        counted[parts[0] if len(parts) > 1 else "root"] += file.read_text("utf-8").count("\n")
    known = budgets()
    assert set(counted) == set(known)
    for folder, lines in counted.items():
        assert 0.9 * known[folder] <= lines <= known[folder], (folder, lines)


def test_no_constructor_has_more_than_ten_arguments() -> None:
    many = []
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                for inner in node.body:
                    if isinstance(inner, ast.FunctionDef) and inner.name == "__init__":
                        given = len(inner.args.args) + len(inner.args.kwonlyargs) - 1
                        many += [f"{node.name}: {given}"] if given > 10 else []
    assert not many


def test_public_names_are_defined_once() -> None:
    """Classes and functions at the top of a module; `__getattr__` of a package is Python's."""
    homes: dict[str, list[str]] = {}
    for file in PACKAGE.rglob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name[0] != "_":
                homes.setdefault(node.name, []).append(file.name)
    assert not {name: files for name, files in homes.items() if len(files) > 1}


def test_public_names_are_few() -> None:
    """Names of every `__all__` together; docs/architecture.md says how many."""
    names = set()
    for file in PACKAGE.rglob("__init__.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                names |= set(ast.literal_eval(node.value))
    text = (PACKAGE.parent / "docs/architecture.md").read_text(encoding="utf-8")
    assert f"{len(names)} public names" in text


def test_no_twelve_lines_stand_twice() -> None:
    """Imports and empty lines aside."""
    seen: dict[tuple[str, ...], str] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        source = file.read_text(encoding="utf-8")
        imports = {
            line
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
        }
        lines = [
            line.strip()
            for number, line in enumerate(source.splitlines(), 1)
            if number not in imports and line.strip()
        ]
        for i in range(len(lines) - 11):
            block = tuple(lines[i : i + 12])
            assert block not in seen, f"{file.name} and {seen[block]}: {block[0]}"
            seen[block] = file.name

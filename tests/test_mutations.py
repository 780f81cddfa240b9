"""`make mutants`: every mutant is one change, compiles, and has a name of its own that lines do
not enter.
"""

import ast
from pathlib import Path

import pytest

from tests import mutations

CODE = '''
LIMIT = 3

def f(x, y=1.5):
    """Doc 1."""
    if x > LIMIT and not y:
        raise ValueError(f"{x + 1} given")
    x = g(x, device=2, dim=1)
    for i in range(x):
        x += i
    return torch.where(x < y, x, -y)
'''


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(mutations, "ROOT", tmp_path)
    (tmp_path / "code.py").write_text(CODE, encoding="utf-8")
    return "code.py"


def test_what_is_changed(code: str) -> None:
    changes = [
        mutant.name.removeprefix("code.py ").rpartition(" #")[0]
        for mutant in mutations.mutants(code)
    ]
    assert sorted(changes) == sorted(
        [
            ": 3 → 4", ": 3 → 2", "f: 1.5 → 2.5", "f: 1.5 → 0.5", "f: x > LIMIT → x >= LIMIT",
            "f: x > LIMIT → x <= LIMIT", "f: x > LIMIT and (not y) → x > LIMIT or not y",
            "f: x > LIMIT and (not y) → (test)", "f: not y → not not y",
            "f: raise ValueError(f'{x + 1} given') → (body)",
            "f: x = g(x, device=2, dim=1) → (body)", "f: g(x, device=2, dim=1) → g(x, device=2)",
            "f: 1 → 2", "f: 1 → 0", "f: x += i → (body)", "f: x += i → x -= i",
            "f: torch.where(x < y, x, -y) → torch.where(x < y, -y, x)", "f: x < y → x <= y",
            "f: x < y → x >= y", "f: -y → +y",
        ]
    )  # fmt: skip


def test_each_is_one_change_that_compiles(code: str) -> None:
    original, found = ast.dump(ast.parse(CODE)), set()
    made = mutations.mutants(code)
    for mutant in made:
        tree = ast.parse(CODE)
        edit = list(mutations.edits(tree))[mutant.index]
        setattr(edit.node, edit.field, edit.new)
        found.add(ast.dump(tree))
        compile(ast.fix_missing_locations(tree), code, "exec")
    assert len(found | {original}) == len(made) + 1
    assert len({mutant.name for mutant in made}) == len(made)


def test_names_outlive_a_move(code: str, tmp_path: Path) -> None:
    before = mutations.mutants(code)
    (tmp_path / code).write_text(
        "# A comment.\n" + CODE.replace("x < y, x", "x < y,\n        x"), encoding="utf-8"
    )
    after = mutations.mutants(code)
    assert [m.name for m in after] == [m.name for m in before]
    assert all(b.line > a.line for a, b in zip(before, after, strict=True))


def test_what_an_import_runs_is_told_apart(code: str) -> None:
    imported = {m.name.split(": ")[1].split(" →")[0] for m in mutations.mutants(code) if m.imported}
    assert imported == {"3", "1.5"}

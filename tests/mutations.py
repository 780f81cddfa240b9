"""The mutants of a file: each differs from it in one place of the syntax tree. See mutants.py,
which runs them.
"""

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

SWAPPED: dict[type, list[type]] = {
    ast.Lt: [ast.LtE, ast.GtE], ast.LtE: [ast.Lt, ast.Gt], ast.Gt: [ast.GtE, ast.LtE],
    ast.GtE: [ast.Gt, ast.Lt], ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq], ast.Is: [ast.IsNot],
    ast.IsNot: [ast.Is], ast.In: [ast.NotIn], ast.NotIn: [ast.In], ast.Add: [ast.Sub],
    ast.Sub: [ast.Add], ast.Mult: [ast.Div], ast.Div: [ast.Mult], ast.FloorDiv: [ast.Mult],
    ast.Mod: [ast.FloorDiv], ast.Pow: [ast.Mult], ast.BitAnd: [ast.BitOr], ast.BitOr: [ast.BitAnd],
    ast.And: [ast.Or], ast.Or: [ast.And], ast.USub: [ast.UAdd],
}  # fmt: skip
PAIRS = ["any all", "min max", "minimum maximum", "argmin argmax", "clamp_min clamp_max"]
RENAMED = {a: b for pair in PAIRS for a, b in (pair.split(), pair.split()[::-1])}
# A device means nothing on a CPU, and `strict` of zip is an assertion. Types, decorators and
# messages do nothing.
KEPT = {"device", "strict"}
SKIPPED = {"annotation", "returns", "decorator_list", "exc", "msg"}


@dataclass(frozen=True)
class Edit:
    """Give `field` of `node` the value `new`. shown: what of it is printed. spans: where to look
    for tests that run it, from its statement to its file.
    """

    node: ast.AST
    field: str
    new: Any
    shown: ast.AST
    spans: list[range]
    scope: str
    imported: bool  # run by the import alone, as defaults are


def edits(tree: ast.Module) -> Iterator[Edit]:
    """All edits of a file, always in the same order."""
    yield from _below(tree, tree, [], [range(1, 10**6)], "", set())


def _below(
    node: ast.AST,
    parent: ast.AST,
    own: list[range],
    around: list[range],
    scope: str,
    bound: set[str],
) -> Iterator[Edit]:
    """Edits of `node` and of what is in it. own: the lines of its statement, none of what an import
    runs; around: of the
    function, class and file that hold it. bound: names that have a value already.
    """
    inside = own or (isinstance(parent, ast.FunctionDef) and isinstance(node, ast.stmt))
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        scope, own, around = f"{scope}.{node.name}".lstrip("."), [], [_lines(node), *around]
        bound = {a.arg for a in ast.walk(node) if isinstance(a, ast.arg)}
    elif isinstance(node, ast.stmt) and inside:
        own = [range(node.lineno, node.body[0].lineno) if hasattr(node, "body") else _lines(node)]
    for field, new, shown in _changes(node, parent, bound):
        dropped = (
            isinstance(shown, ast.stmt)
            and shown is not node
            and (own or isinstance(node, ast.FunctionDef))
        )
        own_spans = [_lines(shown)] if dropped else own
        yield Edit(node, field, new, shown, [*own_spans, *around], scope, not own_spans)
    for field, value in ast.iter_fields(node):
        if field in SKIPPED or isinstance(node, ast.JoinedStr):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and getattr(child, "arg", None) not in KEPT:
                yield from _below(child, node, own, around, scope, bound)
                if isinstance(child, ast.Assign):
                    bound |= _stored(child)


def _lines(node: ast.AST) -> range:
    return range(node.lineno, node.end_lineno + 1)  # type: ignore[attr-defined]


def _stored(statement: ast.AST) -> set[str]:
    return {
        n.id
        for n in ast.walk(statement)
        if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
    }


def _changes(node: ast.AST, parent: ast.AST, bound: set[str]) -> Iterator[tuple[str, Any, ast.AST]]:
    """(field, new value, what to show) of each edit of this node alone."""
    for field in ("body", "orelse"):
        statements = getattr(node, field, None)
        for i, child in enumerate(statements if isinstance(statements, list) else []):
            if _droppable(child, bound):
                yield field, [*statements[:i], ast.Pass(), *statements[i + 1 :]], child
    match node:
        case ast.Compare(ops=ops):
            for i, op in enumerate(ops):
                for new in SWAPPED[type(op)]:
                    yield "ops", [*ops[:i], new(), *ops[i + 1 :]], node
        case ast.UnaryOp(op=ast.Not() | ast.Invert() as op, operand=operand):
            yield "operand", ast.UnaryOp(type(op)(), operand), node
        case ast.BinOp(op=op) | ast.BoolOp(op=op) | ast.AugAssign(op=op) | ast.UnaryOp(op=op):
            for new in SWAPPED.get(type(op), []):
                yield "op", new(), node
        case ast.Constant(value=bool(value)):
            yield "value", not value, parent
        case ast.Constant(value=int() | float() as value):
            for step in (1, -1):
                yield "value", value + step, parent if isinstance(parent, ast.expr) else node
        case ast.Call(keywords=keywords, args=args):
            for keyword in keywords:
                if keyword.arg and keyword.arg not in KEPT:
                    yield "keywords", [k for k in keywords if k is not keyword], node
            if ast.unparse(node.func) == "torch.where" and len(args) == 3:
                yield "args", [args[0], args[2], args[1]], node
        case ast.Attribute(attr=name) if name in RENAMED:
            yield "attr", RENAMED[name], node
        case ast.Name(id=name) if name in RENAMED:
            yield "id", RENAMED[name], node
        case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test) if not isinstance(
            test, ast.Compare
        ):
            yield "test", ast.UnaryOp(ast.Not(), test), test
        case ast.With(items=items):
            yield (
                "items",
                [
                    ast.withitem(
                        ast.parse("__import__('contextlib').nullcontext()", mode="eval").body
                    )
                ],
                items[0],
            )


def _droppable(statement: ast.AST, bound: set[str]) -> bool:
    """Whether the file still runs without: a call, a raise, a second value of a name, a field."""
    match statement:
        case ast.Expr(value=ast.Constant()):
            return False
        case ast.Expr() | ast.Raise() | ast.AugAssign() | ast.Continue() | ast.Break():
            return True
        case ast.Assign():
            return _stored(statement) <= bound
    return False


@dataclass(frozen=True)
class Mutant:
    """name: file, function and change, which outlive other edits. index: of its edit. spans,
    imported: see `Edit`.
    """

    name: str
    path: str
    index: int
    line: int
    spans: list[range]
    imported: bool


def mutants(path: str) -> list[Mutant]:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    found, seen = [], Counter[str]()
    for i, edit in enumerate(edits(tree)):
        old, before = getattr(edit.node, edit.field), ast.unparse(edit.shown)
        setattr(edit.node, edit.field, edit.new)
        after = (
            ast.unparse(edit.shown)
            if edit.field not in ("body", "orelse", "test", "items")
            else f"({edit.field})"
        )
        setattr(edit.node, edit.field, old)
        name = f"{path.removeprefix('dia_lightning/')} {edit.scope}: {before} → {after}"
        seen[name] += 1
        line = getattr(edit.shown, "lineno", edit.spans[0][0])
        found.append(Mutant(f"{name} #{seen[name]}", path, i, line, edit.spans, edit.imported))
    return found


def mutate(mutant: Mutant) -> None:
    """In this process, the file is imported with the change."""
    file = str(ROOT / mutant.path)
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    edit = next(edit for i, edit in enumerate(edits(tree)) if i == mutant.index)
    setattr(edit.node, edit.field, edit.new)
    code, get_code = (
        compile(ast.fix_missing_locations(tree), file, "exec"),
        SourceFileLoader.get_code,
    )
    SourceFileLoader.get_code = lambda self, name: (
        code if self.path == file else get_code(self, name)
    )  # type: ignore

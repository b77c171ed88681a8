"""A condition on the columns of a table, as a person writes it: ``aesthetic >= 4.75 and duration_s >= 2``.

The grammar is a part of Python's, read by ``ast`` and never evaluated: comparisons of a column with a literal
(also chained, ``2 <= duration_s < 10``), ``in`` and ``not in`` a tuple of literals, ``is None`` and
``is not None``, joined by ``and``, ``or``, ``not`` and parentheses. Missing values are as in SQL: a comparison
with one neither holds nor fails, so that ``not (aesthetic < 5)`` does not hold either.
"""

import ast
import difflib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

Kind = Literal["number", "text", "truth", "any"]
"""What a column is compared with: numbers, texts, True or False, or only None."""

_COMPARE = {
    ast.Eq: pc.equal,
    ast.NotEq: pc.not_equal,
    ast.Lt: pc.less,
    ast.LtE: pc.less_equal,
    ast.Gt: pc.greater,
    ast.GtE: pc.greater_equal,
}
_MIRRORED = {ast.Lt: ast.Gt, ast.LtE: ast.GtE, ast.Gt: ast.Lt, ast.GtE: ast.LtE, ast.Eq: ast.Eq, ast.NotEq: ast.NotEq}

_EXAMPLE = "expected a condition such as: aesthetic >= 4.75 and source not in ('a', 'b')"
_MAX_TEXT = 10_000


@dataclass(frozen=True)
class Filter:
    """A condition that was understood. ``columns``: the names it uses, and what each is compared with."""

    text: str
    columns: Mapping[str, Kind]
    _tree: "_Node" = field(repr=False, compare=False)

    @classmethod
    def parse(cls, text: str) -> "Filter":
        """Raises ValueError, in one line, for a text that is no such condition."""
        if len(text) > _MAX_TEXT:
            raise ValueError(f"a filter of {len(text)} characters, expected at most {_MAX_TEXT}")
        try:
            tree = _node(ast.parse(text.strip(), mode="eval").body)
        except SyntaxError as error:
            raise ValueError(f"{_brief(text)} is no condition ({error.msg}): {_EXAMPLE}") from None
        except (RecursionError, MemoryError):
            raise ValueError(f"{_brief(text)} is nested too deeply") from None
        columns: dict[str, Kind] = {}
        for name, kind in tree.uses():
            known = columns.get(name, "any")
            if "any" not in (known, kind) and known != kind:
                raise ValueError(f"{name} is compared with a {known} and with a {kind}, expected one of them")
            columns[name] = kind if known == "any" else known
        return cls(text.strip(), columns, tree)

    def check_columns(self, names: Collection[str]) -> None:
        """Raises ValueError, with the nearest name and all there are, for a column that is not in ``names``."""
        for name in self.columns:
            if name not in names:
                nearest = difflib.get_close_matches(name, names, 1)
                hint = f"did you mean {nearest[0]}? " if nearest else ""
                raise ValueError(f"{self.text!r}: no column {name}; {hint}there are: {', '.join(names)}")

    def mask(self, table: pa.Table | pa.RecordBatch) -> pa.BooleanArray:
        """For each row whether the condition holds; never null.

        A column of another kind than its literals is one of missing values, and so is a NaN. Raises
        ValueError for a column that is not there.
        """
        self.check_columns(table.column_names)
        return self._held(table, otherwise=False)

    def may_hold(self, table: pa.Table | pa.RecordBatch) -> pa.BooleanArray:
        """For each row whether the condition can hold once the columns that ``table`` lacks are known."""
        return self._held(table, otherwise=True)

    def _held(self, table: pa.Table | pa.RecordBatch, otherwise: bool) -> pa.BooleanArray:
        known = {name: kind for name, kind in self.columns.items() if name in table.column_names}
        mask = self._tree.mask({name: _of_kind(table.column(name), kind) for name, kind in known.items()})
        if mask is None:
            return pa.array([otherwise] * table.num_rows, pa.bool_())
        held = pc.fill_null(mask, otherwise)
        return held.combine_chunks() if isinstance(held, pa.ChunkedArray) else held


class _Node:
    """A part of a condition."""

    def uses(self) -> Iterator[tuple[str, Kind]]:
        raise NotImplementedError

    def mask(self, columns: Mapping[str, Any]) -> Any:
        """Arrow booleans, null where it cannot be told; None where nothing can, for want of ``columns``."""
        raise NotImplementedError


@dataclass(frozen=True)
class _Comparison(_Node):
    """``operator`` is a class of ast, ``value`` a literal, or a tuple of them for ``in``, or None for ``is``."""

    name: str
    operator: type[ast.cmpop]
    value: Any
    kind: Kind

    def uses(self) -> Iterator[tuple[str, Kind]]:
        yield self.name, self.kind

    def mask(self, columns: Mapping[str, Any]) -> Any:
        column = columns.get(self.name)
        if column is None:
            return None
        if self.operator is ast.Is:
            return pc.is_null(column)
        if self.operator is ast.IsNot:
            return pc.is_valid(column)
        if self.operator in _COMPARE:
            return _COMPARE[self.operator](column, pa.scalar(self.value, column.type))
        found = pc.is_in(column, value_set=pa.array(self.value, column.type))  # False for null
        found = found if self.operator is ast.In else pc.invert(found)
        return pc.if_else(pc.is_valid(column), found, pa.scalar(None, pa.bool_()))


@dataclass(frozen=True)
class _Joined(_Node):
    """``parts`` joined by and, or by or; ``not`` has one part."""

    operator: type[ast.And] | type[ast.Or] | type[ast.Not]
    parts: tuple[_Node, ...]

    def uses(self) -> Iterator[tuple[str, Kind]]:
        for part in self.parts:
            yield from part.uses()

    def mask(self, columns: Mapping[str, Any]) -> Any:
        masks = [part.mask(columns) for part in self.parts]
        if all(mask is None for mask in masks):
            return None
        if self.operator is ast.Not:
            return pc.invert(masks[0])
        unknown = pa.scalar(None, pa.bool_())
        join = pc.and_kleene if self.operator is ast.And else pc.or_kleene
        return reduce(join, (unknown if mask is None else mask for mask in masks))


def _node(tree: ast.expr) -> _Node:
    if isinstance(tree, ast.BoolOp):
        return _Joined(type(tree.op), tuple(map(_node, tree.values)))  # type: ignore[arg-type]
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.Not):
        return _Joined(ast.Not, (_node(tree.operand),))
    if isinstance(tree, ast.Compare):
        sides = [tree.left, *tree.comparators]
        pairs = zip(sides, tree.ops, sides[1:], strict=False)
        return _Joined(ast.And, tuple(_comparison(left, type(op), right) for left, op, right in pairs))
    raise ValueError(f"found {_brief(ast.unparse(tree))}: {_EXAMPLE}")


def _comparison(left: ast.expr, operator: type[ast.cmpop], right: ast.expr) -> _Comparison:
    name = _name(left)
    if name is None and operator in _MIRRORED:
        left, right, operator = right, left, _MIRRORED[operator]  # type: ignore[index]
        name = _name(left)
    if name is None or _name(right) is not None:
        raise ValueError(f"found {_brief(ast.unparse(left))} beside {_brief(ast.unparse(right))}: {_EXAMPLE}")
    if operator in (ast.Is, ast.IsNot):
        if not (isinstance(right, ast.Constant) and right.value is None):
            raise ValueError(f"{name} is {_brief(ast.unparse(right))}: 'is' goes with None only, use ==")
        return _Comparison(name, operator, None, "any")
    if operator in _COMPARE:
        value, kind = _literal(right)
        return _Comparison(name, operator, value, kind)
    if not isinstance(right, ast.Tuple | ast.List) or not right.elts:
        raise ValueError(f"{name} in {_brief(ast.unparse(right))}: expected a tuple, such as ('a', 'b') or ('a',)")
    values, kinds = zip(*map(_literal, right.elts), strict=True)
    if len(set(kinds)) > 1:
        raise ValueError(f"{name} in {_brief(ast.unparse(right))}: expected literals of one kind")
    return _Comparison(name, operator, values, kinds[0])


def _name(tree: ast.expr) -> str | None:
    """A column: a name, or several with dots between."""
    if isinstance(tree, ast.Attribute):
        inner = _name(tree.value)
        return inner and f"{inner}.{tree.attr}"
    return tree.id if isinstance(tree, ast.Name) else None


def _literal(tree: ast.expr) -> tuple[Any, Kind]:
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub | ast.UAdd):
        value, kind = _literal(tree.operand)
        if kind == "number":
            return (-value if isinstance(tree.op, ast.USub) else value), kind
    elif isinstance(tree, ast.Constant):
        if isinstance(tree.value, bool):
            return tree.value, "truth"
        if isinstance(tree.value, int | float):
            return _float(tree.value), "number"
        if isinstance(tree.value, str) and not any("\ud800" <= letter <= "\udfff" for letter in tree.value):
            return tree.value, "text"
        if tree.value is None:
            raise ValueError("a comparison with None never holds: write 'is None' or 'is not None'")
    raise ValueError(f"found {_brief(ast.unparse(tree))}, expected a number, a text in quotes, True or False")


def _float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"a number of {len(str(value))} digits is too large") from None


def _of_kind(column: Any, kind: Kind) -> Any:
    """The column in the type that its literals have; missing where it holds something else."""
    held = column.type
    if pa.types.is_dictionary(held):
        column, held = column.cast(held.value_type), held.value_type
    if kind == "text":
        texts = pa.types.is_string(held) or pa.types.is_large_string(held) or pa.types.is_string_view(held)
        return column if texts else pa.nulls(len(column), pa.string())
    if kind == "truth":
        return column if pa.types.is_boolean(held) else pa.nulls(len(column), pa.bool_())
    if kind == "number":
        numbers = pa.types.is_integer(held) or pa.types.is_floating(held) or pa.types.is_decimal(held)
        column = column.cast(pa.float64(), safe=False) if numbers else pa.nulls(len(column), pa.float64())
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
    return column


def _brief(text: str) -> str:
    shown = ascii(text)
    return shown if len(shown) <= 60 else shown[:57] + "..."

"""The parameters of a notebook: one cell tagged `parameters` of typed, commented scalars, nothing else.

    n: int = 3  # how many

The cell is read by `ast`, never executed, so that a wrong parameter is refused before anything runs.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TAG = "parameters"
TYPES: dict[str, type] = {"int": int, "float": float, "str": str, "bool": bool}


@dataclass(frozen=True)
class Parameter:
    """One parameter of a notebook: its name, the name of its type, whether None is allowed, its default."""

    name: str
    kind: str
    optional: bool
    default: Any

    @property
    def expected(self) -> str:
        return self.kind + (" or None" if self.optional else "")

    def convert(self, value: Any) -> Any:
        """`value` in the declared type. Text, as a command line gives it, is parsed.

        Raises ValueError with the parameter, what was got and what was expected.
        """
        if self.optional and value in ("None", "none"):
            return None
        return self.check(_parse(value, self.kind) if isinstance(value, str) else value)

    def check(self, value: Any) -> Any:
        """`value`, if it has the declared type; a whole number will do for a float."""
        if value is None and self.optional:
            return None
        if self.kind == "float" and type(value) is int:
            return float(value)
        if type(value) is not TYPES[self.kind]:  # not isinstance, to which True is an int
            raise ValueError(f"parameter {self.name}: got {value!r}, expected {self.expected}.")
        return value


def declared(source: str) -> dict[str, Parameter]:
    """The parameters that the source of a parameters cell declares, in its order.

    Raises ValueError for anything but `name: type = literal`, with the line.
    """
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        raise ValueError(f"parameters cell: line {error.lineno} is not Python: {error.msg}.") from None
    parameters = [_parameter(statement) for statement in statements if not _is_text(statement)]
    return {parameter.name: parameter for parameter in parameters}


def merged(parameters: Mapping[str, Parameter], given: Mapping[str, Any]) -> dict[str, Any]:
    """The value of every parameter: what is `given`, in the declared type, else the default.

    Raises ValueError for an unknown name, with the nearest known one.
    """
    for name in given:
        if name not in parameters:
            near = difflib.get_close_matches(name, parameters, n=1, cutoff=0.5)
            hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(parameters) or 'none'}."
            raise ValueError(f"parameter {name}: this notebook has none of that name. {hint}")
    return {name: item.convert(given.get(name, item.default)) for name, item in parameters.items()}


def _parameter(statement: ast.stmt) -> Parameter:
    expected = "parameters cell: line {}: got {!r}, expected NAME: TYPE = LITERAL, such as n: int = 3."
    refusal = ValueError(expected.format(statement.lineno, ast.unparse(statement)))
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value:
        name, value = statement.target.id, statement.value
        types = ast.unparse(statement.annotation).replace(" ", "").split("|")
    elif isinstance(statement, ast.Assign) and [type(target) for target in statement.targets] == [ast.Name]:
        name, value, types = ast.unparse(statement.targets[0]), statement.value, []
    else:
        raise refusal
    try:
        default = ast.literal_eval(value)
    except (ValueError, TypeError):  # no literal, or one that can't be made, such as {[]: 1}
        raise refusal from None
    kinds = [kind for kind in types if kind != "None"] or [type(default).__name__]
    if len(kinds) != 1 or kinds[0] not in TYPES:
        raise ValueError(
            f"parameters cell: line {statement.lineno}: {name} is declared {' | '.join(types) or kinds[0]}, "
            f"expected one of {', '.join(TYPES)}, alone or with | None."
        )
    parameter = Parameter(name, kinds[0], "None" in types, default)
    parameter.check(default)
    return parameter


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _parse(text: str, kind: str) -> Any:
    """The value that `text` spells in a type; `text` itself where it spells none."""
    if kind == "bool":
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        return TYPES[kind](text)
    except ValueError:
        return text

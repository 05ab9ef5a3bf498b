"""Parts written as text, in Python's own syntax: names of regard, literals, and nothing else.

    Alibi.of(8) + Bias([[0.0, -1.0]])     Causal() & ~Window(256, 0)     Dot(softcap=50.0)

The text is parsed and never evaluated: a name is looked up among regard's parts, their `of` and the
maps of `regard.feature_map`. A list is a tensor, a tuple a tuple; parts combine by + & | ~.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import FunctionType
from typing import Any, TypeVar

import torch

from regard import errors, feature_map, graph, mask, neighborhood, normalizer, position, score
from regard.dropout import Dropout
from regard.features import Features
from regard.grid import Grid
from regard.part import Part

P = TypeVar("P", bound=Part)

OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.Add: operator.add,
    ast.Invert: operator.invert,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


SPELLED = (mask.And, mask.Or, mask.Not, mask.Compiled, position.Positions)
"""What is written with + & | ~, or made by the library alone."""


class LiteralError(errors.RegardError, ValueError):
    """A text that is no part: what is wrong with which piece of it, and what would work."""


@lru_cache(maxsize=1)
def names() -> dict[str, Any]:
    """What a text may name: parts, what they are made of, and maps of features."""
    found: dict[str, Any] = {"Features": Features, "Dropout": Dropout, "Grid": Grid}
    for module in (score, position, mask, neighborhood, graph, normalizer, feature_map):
        for name, item in vars(module).items():
            made = isinstance(item, type) and issubclass(item, (Part, position.Scaling))
            built = made and "__dataclass_fields__" in vars(item) and item not in SPELLED
            if not name.startswith("_") and (built or _is_map(item)):
                found[name] = item
    return found


def _is_map(item: object) -> bool:
    return isinstance(item, FunctionType) and item.__module__ == feature_map.__name__


def part(text: str, kind: type[P]) -> P:
    """The part of a kind that a text stands for; LiteralError says what is wrong with it.

    >>> part("Causal() & Window(256, 0)", mask.Mask)
    Causal() & Window(256, 0)
    >>> part("Windw(1, 1)", mask.Mask)
    Traceback (most recent call last):
    regard.literal.LiteralError: 'Windw' is no part of regard; did you mean Window?
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise LiteralError(
            f"{text!r} is not an expression such as {example(kind)}: {error}"
        ) from error
    found = _Reading(text.strip()).value(tree)
    if isinstance(found, kind):
        return found
    if isinstance(found, type):
        raise LiteralError(f"{text!r} names a class; write an instance: {text.strip()}(...).")
    raise LiteralError(
        f"{text!r} is no {kind.__name__.lower()}; one is {example(kind)}. "
        f"There are: {', '.join(of_kind(kind))}."
    )


def of_kind(kind: type[Part]) -> list[str]:
    """The names of the parts of a kind."""
    return sorted(
        n for n, item in names().items() if isinstance(item, type) and issubclass(item, kind)
    )


def example(kind: type[Part]) -> str:
    """A text that is a part of a kind."""
    examples: dict[type[Part], str] = {
        score.Score: "Dot(softcap=50.0)",
        position.Position: "Alibi.of(8)",
        mask.Mask: "Causal() & Window(256, 0)",
        normalizer.Normalizer: "Softmax(sink=0.0)",
    }
    return f"'{examples.get(kind, 'Dropout(0.1)')}'"


@dataclass(frozen=True)
class _Reading:
    """The value of each kind of node; every other node is refused."""

    text: str

    def value(self, node: ast.expr) -> Any:
        """What an expression stands for."""
        found: Any
        match node:
            case ast.Constant(value=bool() | int() | float() | str() | None):
                found = node.value
            case ast.Name(id=name):
                found = self._named(name)
            case ast.List():
                found = self._made(node, torch.tensor, [self._numbers(node)], {})
            case ast.Tuple(elts=entries):
                found = tuple(self.value(entry) for entry in entries)
            case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATORS:
                found = self._made(node, OPERATORS[type(op)], [self.value(operand)], {})
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
                sides = [self.value(left), self.value(right)]
                found = self._made(node, OPERATORS[type(op)], sides, {})
            case ast.Call(func=function, args=given, keywords=keywords) if all(
                word.arg for word in keywords
            ):
                named = {str(word.arg): self.value(word.value) for word in keywords}
                made = self._function(function)
                found = self._made(node, made, [self.value(entry) for entry in given], named)
            case _:
                raise LiteralError(
                    f"{self._piece(node)!r} is not allowed here; a part is written with regard's "
                    "names, numbers, strings, (tuples), [lists as tensors], and + & | ~."
                )
        return found

    def _numbers(self, node: ast.expr) -> Any:
        return [*map(self._numbers, node.elts)] if isinstance(node, ast.List) else self.value(node)

    def _named(self, name: str) -> Any:
        if name in names():
            return names()[name]
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(sorted(names()))}."
        raise LiteralError(f"{name!r} is no part of regard; {hint}")

    def _function(self, node: ast.expr) -> Callable[..., Any]:
        """A class, or a static method that makes one, such as `Alibi.of`."""
        match node:
            case ast.Name(id=name) if isinstance(self._named(name), type):
                made: Callable[..., Any] = self._named(name)
                return made
            case ast.Attribute(value=ast.Name(id=name), attr=way):
                kind = self._named(name)
                ways = [
                    entry
                    for entry in (vars(kind) if isinstance(kind, type) else ())
                    if isinstance(inspect.getattr_static(kind, entry), staticmethod)
                ]
                if way in ways:
                    found: Callable[..., Any] = getattr(kind, way)
                    return found
                made_by = " or ".join(f"{name}.{way}(...)" for way in ways) or f"{name}(...)"
                raise LiteralError(f"{name} is not made by .{way}; write {made_by}.")
        raise LiteralError(f"{self._piece(node)!r} cannot be called; parts can, such as Causal().")

    def _made(
        self, node: ast.expr, make: Callable[..., Any], given: list[Any], named: dict[str, Any]
    ) -> Any:
        try:
            return make(*given, **named)
        except LiteralError:
            raise
        except (errors.RegardError, ValueError, TypeError, RuntimeError, AttributeError) as error:
            raise LiteralError(f"{self._piece(node)!r}: {error}") from error

    def _piece(self, node: ast.expr) -> str:
        return ast.get_source_segment(self.text, node) or self.text

"""Formulas over a Builder, written as one writes them on tensors: what the tables of activations.py and special.py consist of."""

from __future__ import annotations

from collections.abc import Callable

from flexref.program.builder import Builder, Ref

Row = Callable[..., Ref]


class Term:
    """A node, with Python's operators; the other operand is a Term or a number."""

    __slots__ = ("builder", "ref")

    def __init__(self, builder: Builder, ref: Ref):
        self.builder, self.ref = builder, ref

    @property
    def type(self) -> str:
        return self.builder.type(self.ref)

    def __neg__(self) -> Term:
        return op("neg", self)

    def __abs__(self) -> Term:
        return op("abs", self)

    def __invert__(self) -> Term:
        return op("not", self)

    def __add__(self, other) -> Term:
        return op("add", self, other)

    def __radd__(self, other) -> Term:
        return op("add", other, self)

    def __sub__(self, other) -> Term:
        return op("sub", self, other)

    def __rsub__(self, other) -> Term:
        return op("sub", other, self)

    def __mul__(self, other) -> Term:
        return op("mul", self, other)

    def __rmul__(self, other) -> Term:
        return op("mul", other, self)

    def __truediv__(self, other) -> Term:
        return op("div", self, other)

    def __rtruediv__(self, other) -> Term:
        return op("div", other, self)

    def __lt__(self, other) -> Term:
        return op("lt", self, other)

    def __le__(self, other) -> Term:
        return op("le", self, other)

    def __gt__(self, other) -> Term:
        return op("gt", self, other)

    def __ge__(self, other) -> Term:
        return op("ge", self, other)

    def __and__(self, other) -> Term:
        return op("and", self, other)

    def __or__(self, other) -> Term:
        return op("or", self, other)

    def equals(self, other) -> Term:
        return op("eq", self, other)

    def differs(self, other) -> Term:
        return op("ne", self, other)


def op(name: str, *args) -> Term:
    """An operation of the program, of which at least one argument is a Term."""
    builder = next(x.builder for x in args if isinstance(x, Term))
    return Term(builder, builder.op(name, *(x.ref if isinstance(x, Term) else x for x in args)))


def where(condition: Term, a, b) -> Term:
    return op("where", condition, a, b)


def formula(written: Callable[..., Term]) -> Row:
    """A row of LOWERING from a function of Terms and numbers."""

    def row(builder: Builder, *args, **kwargs) -> Ref:
        def term(x):
            return Term(builder, x) if isinstance(x, Ref) else x

        return written(*(term(x) for x in args), **{name: term(x) for name, x in kwargs.items()}).ref

    return row


def rows(**written: Callable[..., Term]) -> dict[str, Row]:
    return {name: formula(function) for name, function in written.items()}

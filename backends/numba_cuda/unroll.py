"""The small macro language of the kernels: loops and register arrays that exist only while a kernel is being generated.

    s = registers(2, 3)                 six variables s_0_0 ... s_1_2, which the compiler can keep in registers
    for i in unrolled(2): s[i, 0] = x   two statements
    s = unpacked(f(packed(s)))          a tuple of all of them, there and back
    if CAREFUL: ...                     a condition of constants is decided now

A constant is a name in capitals, or a function of constants, that kernels_for.py gives a value; expressions of them become
numbers. On a GPU an index of an array becomes unsigned: Numba would add code for negative ones, which count from the end.
"""
from __future__ import annotations

import ast
import copy
import itertools
from collections.abc import Mapping


class _Dynamic(Exception):
    """An expression is not known before the kernel runs."""


def expand(text: str, constants: Mapping[str, object], unsigned: bool) -> str:
    """The kernel's source without macros. Raises SyntaxError, with the line, where one is used wrongly."""
    tree = _Expand(constants, unsigned).visit(ast.parse(text))
    return ast.unparse(ast.fix_missing_locations(tree)) + "\n"


class _Expand(ast.NodeTransformer):
    def __init__(self, constants: Mapping[str, object], unsigned: bool):
        self.constants, self.unsigned = dict(constants), unsigned
        self.registers: dict[str, tuple[int, ...]] = {}

    def value(self, node: ast.expr):
        """What an expression of constants is."""
        for part in ast.walk(node):
            free = isinstance(part, ast.Name) and part.id not in self.constants
            called = isinstance(part, ast.Call) and not callable(self.constants.get(ast.unparse(part.func)))
            if free or called or isinstance(part, ast.Subscript | ast.Attribute):
                raise _Dynamic(ast.unparse(node))
        whole = ast.fix_missing_locations(ast.Expression(node))
        return eval(compile(whole, "<constant>", "eval"), {"__builtins__": {}}, self.constants)

    def number(self, node: ast.expr) -> int:
        try:
            return int(self.value(node))
        except _Dynamic:
            raise SyntaxError(f"line {node.lineno}: {ast.unparse(node)} must be a constant here") from None

    def folded(self, node: ast.expr) -> ast.expr:
        """The node, or the number that it is."""
        try:
            value = self.value(node)
        except _Dynamic:
            return node
        return ast.Constant(value) if isinstance(value, bool | int) else node

    def visit_FunctionDef(self, node: ast.FunctionDef):
        outer, self.registers = self.registers, {}
        self.generic_visit(node)
        self.registers = outer
        node.body = node.body or [ast.Pass()]
        return node

    def visit_For(self, node: ast.For):
        if not _is_call(node.iter, "unrolled"):
            self.generic_visit(node)
            return node
        assert isinstance(node.iter, ast.Call) and isinstance(node.target, ast.Name)
        statements, before = [], self.constants
        for turn in range(*(self.number(a) for a in node.iter.args)):
            self.constants = before | {node.target.id: turn}
            for statement in copy.deepcopy(node.body):
                done = self.visit(statement)
                statements += done if isinstance(done, list) else [] if done is None else [done]
        self.constants = before
        return statements

    def visit_If(self, node: ast.If):
        try:
            taken = node.body if self.value(node.test) else node.orelse
        except _Dynamic:
            self.generic_visit(node)
            node.body = node.body or [ast.Pass()]
            return node
        statements = []
        for statement in taken:
            done = self.visit(statement)
            statements += done if isinstance(done, list) else [] if done is None else [done]
        return statements

    def visit_Assign(self, node: ast.Assign):
        target = node.targets[0]
        if isinstance(target, ast.Name) and _is_call(node.value, "registers"):
            assert isinstance(node.value, ast.Call)
            self.registers[target.id] = tuple(self.number(a) for a in node.value.args)
            return None
        if isinstance(target, ast.Name) and _is_call(node.value, "unpacked"):
            assert isinstance(node.value, ast.Call)
            names: list[ast.expr] = [ast.Name(name, ast.Store()) for name in self.all_of(target)]
            whole: list[ast.expr] = [ast.Tuple(names, ast.Store())]
            return ast.Assign(whole, self.visit(node.value.args[0]), lineno=node.lineno)
        self.generic_visit(node)
        return node

    def all_of(self, node: ast.expr) -> list[str]:
        if not isinstance(node, ast.Name) or node.id not in self.registers:
            raise SyntaxError(f"line {node.lineno}: {ast.unparse(node)} was not declared with registers(...)")
        places = itertools.product(*(range(n) for n in self.registers[node.id]))
        return ["_".join(map(str, (node.id, *place))) for place in places]

    def visit_Call(self, node: ast.Call):
        if _is_call(node, "packed"):
            return ast.Tuple([ast.Name(name, ast.Load()) for name in self.all_of(node.args[0])], ast.Load())
        folded = self.folded(node)
        return folded if isinstance(folded, ast.Constant) else self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript):
        if isinstance(node.value, ast.Name) and node.value.id in self.registers:
            sizes = self.registers[node.value.id]
            index = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            place = [self.number(i) for i in index]
            if len(place) != len(sizes) or not all(0 <= i < n for i, n in zip(place, sizes, strict=True)):
                raise SyntaxError(f"line {node.lineno}: {ast.unparse(node)} is no register of {node.value.id}{sizes}")
            return ast.Name("_".join(map(str, (node.value.id, *place))), node.ctx)
        self.generic_visit(node)
        if isinstance(node.slice, ast.Slice):
            return node
        node.slice = self.folded(node.slice)
        if self.unsigned and not isinstance(node.slice, ast.Constant):
            node.slice = ast.Call(ast.Name("unsigned", ast.Load()), [node.slice], [])
        return node

    def visit_Name(self, node: ast.Name):
        # names in capitals stay, for the reader: they are globals of the module
        if node.id in self.constants and not node.id.isupper() and isinstance(node.ctx, ast.Load):
            return ast.Constant(self.constants[node.id])  # type: ignore[arg-type]
        return node

    def visit_BinOp(self, node: ast.BinOp):
        node = self.folded(node)  # type: ignore[assignment]
        return node if isinstance(node, ast.Constant) else self.generic_visit(node)

    visit_BoolOp = visit_Compare = visit_BinOp  # type: ignore[assignment]


def _is_call(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name

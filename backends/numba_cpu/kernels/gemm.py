"""The two dense kernels, in LLVM vector instructions: a matrix product whose sums stay in registers, and a transpose.

Everything else in a driver is written in Python and vectorised by LLVM; these two it cannot find by itself. Each is
made once for a number type and called by address, so that no driver has to be compiled together with it.

gemm(m, n, k, a, a_row, a_col, b, b_row, c, c_row, add): C[m, n] = A[m, k] B[k, n], added to C if `add`. A has any
strides (in elements). B and C have rows of contiguous numbers; n is a multiple of the vector width, k at least 1.
transpose(m, n, a, a_row, b, b_row): B[n, m] = A[m, n]; m and n are multiples of the vector width, rows contiguous.
"""
from __future__ import annotations

import llvmlite.binding as llvm
from llvmlite import ir

_I64, _I32 = ir.IntType(64), ir.IntType(32)
_ZERO = ir.Constant(_I64, 0)
_LLVM = {4: ir.FloatType(), 8: ir.DoubleType()}


def vector_bytes() -> int:
    """The widest vector register of this machine, in bytes."""
    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return 64
    return 32 if features.get("avx2") and features.get("fma") else 16


def block_shapes() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Rows and vectors of the register blocks that are tried in turn: 4 x 4 sums fill half of 32 registers."""
    return ((4, 1), (2, 1)) if vector_bytes() == 32 else ((4, 1), (4, 2, 1))


def dense_source(kernel: str, size: int) -> str:
    """The LLVM module of the function `kernel`, "gemm" or "transpose", for numbers of `size` bytes."""
    module = ir.Module(kernel)
    module.triple = llvm.get_process_triple()
    {"gemm": _gemm, "transpose": _transpose}[kernel](module, size)
    return str(module)


class _Writer:
    """An LLVM function under construction, with the few phrases that both kernels use."""

    def __init__(self, module: ir.Module, name: str, count: int, size: int):
        self.function = ir.Function(module, ir.FunctionType(ir.VoidType(), [_I64] * count), name)
        self.ir = ir.IRBuilder(self.function.append_basic_block())
        self.real, self.size, self.lanes = _LLVM[size], size, vector_bytes() // size
        self.vector = ir.VectorType(self.real, self.lanes)

    def address(self, base, *offsets):
        """`base` plus a number of elements."""
        for offset in offsets:
            count = offset if isinstance(offset, ir.Value) else ir.Constant(_I64, offset)
            base = self.ir.add(base, self.ir.mul(count, ir.Constant(_I64, self.size)))
        return base

    def load(self, address, kind):
        return self.ir.load(self.ir.inttoptr(address, kind.as_pointer()), align=self.size)

    def store(self, value, address):
        self.ir.store(value, self.ir.inttoptr(address, value.type.as_pointer()), align=self.size)

    def splat(self, value):
        undefined = ir.Constant(self.vector, ir.Undefined)
        first = self.ir.insert_element(undefined, value, _I32(0))
        return self.ir.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_I32, self.lanes), None))

    def steps(self, start, limit, step, body):
        """`for i in range(start, limit, step)` for as many whole steps as there are; returns where it ended."""
        before = self.ir.block
        head, inside, after = (self.ir.append_basic_block() for _ in range(3))
        self.ir.branch(head)
        self.ir.position_at_end(head)
        i = self.ir.phi(_I64)
        i.add_incoming(start, before)
        end = self.ir.add(i, ir.Constant(_I64, step))
        self.ir.cbranch(self.ir.icmp_signed("<=", end, limit), inside, after)
        self.ir.position_at_end(inside)
        body(i)
        i.add_incoming(end, self.ir.block)
        self.ir.branch(head)
        self.ir.position_at_end(after)
        return i


def _gemm(module: ir.Module, size: int) -> None:
    w = _Writer(module, "gemm", 11, size)
    m, n = w.function.args[:2]
    row_blocks, column_blocks = block_shapes()
    column = _ZERO
    for vectors in column_blocks:

        def panel(j, vectors=vectors):
            row = _ZERO
            for rows in row_blocks:
                row = w.steps(row, m, rows, lambda i, rows=rows: _block(w, i, j, rows, vectors))

        column = w.steps(column, n, vectors * w.lanes, panel)
    w.ir.ret_void()


def _block(w: _Writer, i, j, rows: int, vectors: int) -> None:
    """One block of `rows` x `vectors` sums: a loop over k that keeps them in registers, then one store each."""
    _, _, k, a, a_row, a_col, b, b_row, c, c_row, add = w.function.args
    starts = [w.address(a, w.ir.mul(w.ir.add(i, ir.Constant(_I64, r)), a_row)) for r in range(rows)]
    b_start = w.address(b, j)
    before, loop, done = w.ir.block, w.ir.append_basic_block(), w.ir.append_basic_block()
    w.ir.branch(loop)
    w.ir.position_at_end(loop)
    at = w.ir.phi(_I64)
    at.add_incoming(_ZERO, before)
    sums = [[w.ir.phi(w.vector) for _ in range(vectors)] for _ in range(rows)]
    products = _products(w, at, starts, b_start, sums)
    following = w.ir.add(at, ir.Constant(_I64, 1))
    at.add_incoming(following, loop)
    for old, new in zip(sums, products, strict=True):
        for x, y in zip(old, new, strict=True):
            x.add_incoming(ir.Constant(w.vector, None), before)
            x.add_incoming(y, loop)
    w.ir.cbranch(w.ir.icmp_signed("<", following, k), loop, done)
    w.ir.position_at_end(done)
    places = [
        [w.address(c, w.ir.mul(w.ir.add(i, ir.Constant(_I64, r)), c_row), j, x * w.lanes) for x in range(vectors)]
        for r in range(rows)
    ]
    pairs = [pair for r in range(rows) for pair in zip(products[r], places[r], strict=True)]
    with w.ir.if_else(w.ir.icmp_signed("!=", add, _ZERO)) as (added, plain):
        with added:
            for value, place in pairs:
                w.store(w.ir.fadd(w.load(place, w.vector), value), place)
        with plain:
            for value, place in pairs:
                w.store(value, place)


def _products(w: _Writer, at, starts, b_start, sums):
    """The sums after step `at`: one number of A against one vector of B each."""
    a_col, b_row = w.function.args[5], w.function.args[7]
    row = w.address(b_start, w.ir.mul(at, b_row))
    right = [w.load(w.address(row, x * w.lanes), w.vector) for x in range(len(sums[0]))]
    column = w.ir.mul(at, a_col)
    left = [w.splat(w.load(w.address(start, column), w.real)) for start in starts]
    fma = w.ir.module.declare_intrinsic(
        f"llvm.fma.v{w.lanes}f{w.size * 8}", fnty=ir.FunctionType(w.vector, [w.vector] * 3)
    )
    return [
        [w.ir.call(fma, [x, y, old]) for y, old in zip(right, olds, strict=True)]
        for x, olds in zip(left, sums, strict=True)
    ]


def _transpose(module: ir.Module, size: int) -> None:
    w = _Writer(module, "transpose", 6, size)
    m, n, a, a_row, b, b_row = w.function.args

    def square(i, j):
        rows = [
            w.load(w.address(a, w.ir.mul(w.ir.add(i, ir.Constant(_I64, r)), a_row), j), w.vector)
            for r in range(w.lanes)
        ]
        for r, row in enumerate(_transposed(w, rows)):
            w.store(row, w.address(b, w.ir.mul(w.ir.add(j, ir.Constant(_I64, r)), b_row), i))

    w.steps(_ZERO, m, w.lanes, lambda i: w.steps(_ZERO, n, w.lanes, lambda j: square(i, j)))
    w.ir.ret_void()


def _transposed(w: _Writer, rows: list) -> list:
    """A square of vectors transposed: in each stage, pairs of rows swap squares of 1, 2, 4, ... numbers."""
    lanes, size = w.lanes, 1
    masks = ir.VectorType(_I32, lanes)
    while size < lanes:
        low = [x if not x & size else lanes + x - size for x in range(lanes)]
        high = [x + size if not x & size else lanes + x for x in range(lanes)]
        for r in (r for r in range(lanes) if not r & size):
            pair = rows[r], rows[r + size]
            rows[r] = w.ir.shuffle_vector(*pair, ir.Constant(masks, [_I32(x) for x in low]))
            rows[r + size] = w.ir.shuffle_vector(*pair, ir.Constant(masks, [_I32(x) for x in high]))
        size *= 2
    return rows

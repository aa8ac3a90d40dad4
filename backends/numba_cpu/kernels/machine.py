"""Machine operations that Numba has no word for: raw memory, half types, an atomic counter, a call by address.

Each is an LLVM instruction or two, so that it costs nothing to compile or to run.
"""
from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from flexref.backends.numba_cpu.kernels.gemm import vector_bytes

_FLOAT_BITS = {types.float32: types.int32, types.float64: types.int64}


def lanes_of(real) -> int:
    """How many numbers of this Numba type one vector register holds."""
    return vector_bytes() // (real.bitwidth // 8)


@intrinsic
def pointer(typingctx, address, kind):
    """An int64 address as a pointer to elements of `kind`, a Numba type."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(kind.instance_type)(types.int64, kind), codegen


@intrinsic
def next_task(typingctx, address):
    """The counter at `address`, which is then one more; every worker gets another number."""

    def codegen(context, builder, signature, args):
        counter = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", counter, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.int64), codegen


@intrinsic
def call_tile(typingctx, function, params, tile):
    """Call the tile function at the address `function` with the addresses of the two tables of layout.py.

    A function compiled by Numba takes two places more, for its result and its exception; a tile function has neither.
    """

    def codegen(context, builder, signature, args):
        i64, i32 = ir.IntType(64), ir.IntType(32)
        place = i64.as_pointer()
        callee_type = ir.FunctionType(i32, [place, place, i64, i64])
        callee = builder.inttoptr(args[0], callee_type.as_pointer())
        with builder.goto_entry_block():
            unused = builder.alloca(i64)
        builder.call(callee, [unused, unused, args[1], args[2]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


def _call_dense(args, builder, context):
    whole = ir.IntType(64)
    callee_type = ir.FunctionType(ir.VoidType(), [whole] * (len(args) - 1))
    builder.call(builder.inttoptr(args[0], callee_type.as_pointer()), args[1:])
    return context.get_dummy_value()


@intrinsic
def gemm(typingctx, function, m, n, k, a, a_row, a_col, b, b_row, c, c_row, add):
    """Call gemm.py's product at the address `function`; a, b, c are addresses."""

    def codegen(context, builder, signature, args):
        return _call_dense(args, builder, context)

    return types.void(*[types.int64] * 12), codegen


@intrinsic
def transpose(typingctx, function, m, n, a, a_row, b, b_row):
    """Call gemm.py's transpose at the address `function`."""

    def codegen(context, builder, signature, args):
        return _call_dense(args, builder, context)

    return types.void(*[types.int64] * 7), codegen


@intrinsic
def bits(typingctx, x):
    """The bits of a float as an integer of the same size."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(signature.return_type))

    return _FLOAT_BITS[x](x), codegen


@intrinsic
def from_bits(typingctx, x):
    """The float that has these bits."""
    result = {types.int32: types.float32, types.int64: types.float64}[x]

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(signature.return_type))

    return result(x), codegen


@intrinsic
def select(typingctx, condition, yes, no):
    """`yes if condition else no` without a branch, for two numbers of one kind; the wider type wins."""
    result = typingctx.unify_types(yes, no)

    def codegen(context, builder, signature, args):
        taken = builder.icmp_unsigned("!=", args[0], ir.Constant(args[0].type, 0))
        values = [context.cast(builder, x, kind, result) for x, kind in zip(args[1:], (yes, no), strict=True)]
        return builder.select(taken, *values)

    return result(condition, yes, no), codegen


@intrinsic
def smaller(typingctx, a, b):
    """The smaller of two int64."""

    def codegen(context, builder, signature, args):
        return builder.select(builder.icmp_signed("<", *args), *args)

    return types.int64(types.int64, types.int64), codegen


def _reader(kind, result, convert):
    def read(typingctx, address, index):
        def codegen(context, builder, signature, args):
            base = builder.inttoptr(args[0], kind.as_pointer())
            return convert(builder, builder.load(builder.gep(base, [args[1]])))

        return result(types.int64, types.int64), codegen

    return intrinsic(read)


def _writer(kind, source, convert):
    def write(typingctx, address, index, value):
        def codegen(context, builder, signature, args):
            base = builder.inttoptr(args[0], kind.as_pointer())
            builder.store(convert(builder, args[2]), builder.gep(base, [args[1]]))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, source), codegen

    return intrinsic(write)


_I16, _I32, _FLOAT = ir.IntType(16), ir.IntType(32), ir.FloatType()


def _from_bfloat16(builder, x):
    return builder.bitcast(builder.shl(builder.zext(x, _I32), _I32(16)), _FLOAT)


def _to_bfloat16(builder, x):
    """Round to nearest even: half of what is cut off, plus one if the last bit kept is odd; nan stays nan."""
    whole = builder.bitcast(x, _I32)
    odd = builder.and_(builder.lshr(whole, _I32(16)), _I32(1))
    rounded = builder.add(whole, builder.add(odd, _I32(0x7FFF)))
    kept = builder.trunc(builder.lshr(rounded, _I32(16)), _I16)
    return builder.select(builder.fcmp_unordered("uno", x, x), _I16(0x7FC0), kept)


read_float64 = _reader(ir.DoubleType(), types.float64, lambda builder, x: x)
read_float32 = _reader(_FLOAT, types.float32, lambda builder, x: x)
read_float16 = _reader(ir.HalfType(), types.float32, lambda builder, x: builder.fpext(x, _FLOAT))
read_bfloat16 = _reader(_I16, types.float32, _from_bfloat16)
write_float64 = _writer(ir.DoubleType(), types.float64, lambda builder, x: x)
write_float32 = _writer(_FLOAT, types.float32, lambda builder, x: x)
write_float16 = _writer(ir.HalfType(), types.float32, lambda builder, x: builder.fptrunc(x, ir.HalfType()))
write_bfloat16 = _writer(_I16, types.float32, _to_bfloat16)

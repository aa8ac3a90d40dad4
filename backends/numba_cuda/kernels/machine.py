"""What a GPU can do and Numba has no word for; simulated.py has the same names for the simulator.

Numbers of half precision are bits in uint16; `pack` makes a register of two of them. The instructions for the two half types
differ in one word, so their functions carry its name.
"""
from __future__ import annotations

from llvmlite import ir
from numba import cuda
from numba.cuda import float32, float64, int32, int64, types, uint8, uint16, uint64  # noqa: F401
from numba.cuda.extending import intrinsic

_FLOAT, _DOUBLE, _HALF = ir.FloatType(), ir.DoubleType(), ir.HalfType()
_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
SHARED, GLOBAL = 3, 1
unsigned = uint64
zero_bits = uint16(0)
device = cuda.jit(device=True, forceinline=True)


def array_of(kind):
    """The type of a shared array's elements."""
    return kind


def kernel(function):
    """Marks a kernel; compiler.py compiles it for the types that it is called with."""
    return function


@device
def select(condition, yes, no):
    return yes if condition else no


@device
def shuffle_xor(x, mask):
    """What the lane whose number differs in the bits of `mask` holds."""
    return cuda.shfl_xor_sync(0xFFFFFFFF, x, mask)


@device
def shuffle(x, lane):
    """What a lane of the warp holds."""
    return cuda.shfl_sync(0xFFFFFFFF, x, lane)


@device
def sync_warp():
    cuda.syncwarp()


def _place(context, builder, kind, array, index, space):
    """The address of array[index] as a pointer into `space`."""
    data = context.make_array(kind)(context, builder, array).data
    element = context.get_value_type(kind.dtype)
    generic = builder.gep(builder.bitcast(data, element.as_pointer()), [index], source_etype=element)
    return builder.addrspacecast(generic, element.as_pointer(space))


def _tuple_of(context, builder, result, parts):
    return context.make_tuple(builder, result, [builder.extract_value(parts, i) for i in range(result.count)])


def _ldmatrix(down: str):
    def load(typingctx, tile, at, further):
        """`further`, a literal, is added in the instruction: a register for each sum would be kept all through the kernel."""
        if not isinstance(further, types.IntegerLiteral):
            return None
        result = types.UniTuple(types.int32, 4)

        def codegen(context, builder, signature, args):
            place = builder.ptrtoint(_place(context, builder, tile, *args[:2], SHARED), _I32)
            kind = ir.FunctionType(ir.LiteralStructType([_I32] * 4), [_I32])
            text = f"ldmatrix.sync.aligned.m8n8.x4{down}.shared.b16 {{$0,$1,$2,$3}}, [$4+{2 * further.literal_value}];"
            code = ir.InlineAsm(kind, text, "=r,=r,=r,=r,r,~{memory}", side_effect=True)
            return _tuple_of(context, builder, result, builder.call(code, [place], attrs=("convergent",)))

        return result(tile, types.int64, further), codegen

    return intrinsic(load)


ldmatrix = _ldmatrix("")
ldmatrix_down = _ldmatrix(".trans")


def _mma(half: str):
    def multiply(typingctx, c0, c1, c2, c3, a0, a1, a2, a3, b0, b1):
        result = types.UniTuple(types.float32, 4)

        def codegen(context, builder, signature, args):
            kind = ir.FunctionType(ir.LiteralStructType([_FLOAT] * 4), [_I32] * 6 + [_FLOAT] * 4)
            text = (
                f"mma.sync.aligned.m16n8k16.row.col.f32.{half}.{half}.f32 "
                "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
            )
            code = ir.InlineAsm(kind, text, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", side_effect=False)
            return _tuple_of(context, builder, result, builder.call(code, [*args[4:], *args[:4]], attrs=("convergent",)))

        return result(*[types.float32] * 4, *[types.int32] * 6), codegen

    multiply.__name__ = f"mma_{half}"
    return intrinsic(multiply)


mma_float16, mma_bfloat16 = _mma("f16"), _mma("bf16")


def _pack(half: str):
    def pack(typingctx, low, high):
        def codegen(context, builder, signature, args):
            kind = ir.FunctionType(_I32, [_FLOAT, _FLOAT])
            code = ir.InlineAsm(kind, f"cvt.rn.{half}x2.f32 $0, $2, $1;", "=r,f,f", side_effect=False)
            return builder.call(code, args)

        return types.int32(types.float32, types.float32), codegen

    return intrinsic(pack)


pack_float16, pack_bfloat16 = _pack("f16"), _pack("bf16")


@intrinsic
def copy16(typingctx, tile, at, source, start, inside):
    """16 bytes from global to shared memory in the background; zeros, and nothing is read, unless `inside`."""

    def codegen(context, builder, signature, args):
        target = builder.ptrtoint(_place(context, builder, tile, args[0], args[1], SHARED), _I32)
        origin = builder.ptrtoint(_place(context, builder, source, args[2], args[3], GLOBAL), _I64)
        size = builder.select(builder.icmp_unsigned("!=", args[4], args[4].type(0)), _I32(16), _I32(0))
        kind = ir.FunctionType(ir.VoidType(), [_I32, _I64, _I32])
        text = "cp.async.cg.shared.global [$0], [$1], 16, $2;"
        builder.call(ir.InlineAsm(kind, text, "r,l,r,~{memory}", side_effect=True), [target, origin, size])
        return context.get_dummy_value()

    return types.void(tile, types.int64, source, types.int64, types.boolean), codegen


@intrinsic
def wait_copies(typingctx):
    """Until all that this thread has begun with copy16 is there."""

    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [])
        builder.call(ir.InlineAsm(kind, "cp.async.wait_all;", "~{memory}", side_effect=True), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def maximum(typingctx, x, y):
    """The greater number; if one is nan, the other."""

    def codegen(context, builder, signature, args):
        kind = context.get_value_type(x)
        function = builder.module.declare_intrinsic("llvm.maxnum", [kind], ir.FunctionType(kind, [kind, kind]))
        return builder.call(function, args)

    return x(x, x), codegen


@intrinsic
def exp2_float32(typingctx, x):
    """2^x to 2 units in the last place; 0 where that would be subnormal."""

    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(_FLOAT, [_FLOAT])
        return builder.call(ir.InlineAsm(kind, "ex2.approx.ftz.f32 $0, $1;", "=f,f", side_effect=False), args)

    return types.float32(types.float32), codegen


@device
def exp2_float64(x):
    return cuda.libdevice.exp2(x)


@device
def minus_float32(a, b):
    """a - b of a rounded a, and not of the product that a may be: both must have been rounded alike to cancel out."""
    return cuda.libdevice.fsub_rn(a, b)


@device
def minus_float64(a, b):
    return cuda.libdevice.dadd_rn(a, -b)


def _converter(source, result, convert):
    def codegen(context, builder, signature, args):
        return convert(builder, args[0])

    return intrinsic(lambda typingctx, x: (result(source), codegen))


def _to_bfloat16(builder, x):
    """Round to nearest even: half of what is cut off, plus one if the last bit kept is odd; nan stays nan."""
    whole = builder.bitcast(x, _I32)
    odd = builder.and_(builder.lshr(whole, _I32(16)), _I32(1))
    rounded = builder.add(whole, builder.add(odd, _I32(0x7FFF)))
    kept = builder.trunc(builder.lshr(rounded, _I32(16)), _I16)
    return builder.select(builder.fcmp_unordered("uno", x, x), _I16(0x7FC0), kept)


from_bfloat16 = _converter(
    types.uint16, types.float32, lambda b, x: b.bitcast(b.shl(b.zext(x, _I32), _I32(16)), _FLOAT)
)
from_float16 = _converter(types.uint16, types.float32, lambda b, x: b.fpext(b.bitcast(x, _HALF), _FLOAT))
to_bfloat16 = _converter(types.float32, types.uint16, _to_bfloat16)
to_float16 = _converter(types.float32, types.uint16, lambda b, x: b.bitcast(b.fptrunc(x, _HALF), _I16))

"""Vectors of `LANES` float32 numbers for numba kernels: loads, stores, arithmetic and the functions Mamba needs.

Numba leaves vectorisation to the optimiser, which gives up on the scan: its arrays may overlap and its inner loop is
short. Here a vector is a value of its own that maps to one LLVM vector, so a kernel says what runs side by side and
LLVM only chooses the instructions of the machine. Kernels address memory by plain integers (bytes).

NaN and infinity pass through every function: nothing here allows the optimiser to assume they do not occur.
"""

# mypy: allow-untyped-defs
# (numba infers the types of compiled functions)

from __future__ import annotations

import operator
from typing import Any

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import njit, types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

LANES = 16 if get_host_cpu_features().get("avx512f", False) else 8  # one register, or two of a narrower machine
VECTOR = 4 * LANES  # bytes of a vector of float32

_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_INTS = ir.VectorType(ir.IntType(32), LANES)
_HALVES = ir.VectorType(ir.IntType(16), LANES)


class VectorType(types.Type):
    """The numba type of `LANES` float32 numbers."""

    def __init__(self) -> None:
        super().__init__(name=f"mambacus_vector{LANES}")


vector = VectorType()


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: VectorType) -> None:
        super().__init__(manager, numba_type, _FLOATS)


def _constant(value: float, kind: ir.VectorType = _FLOATS) -> ir.Constant:
    return ir.Constant(kind, [value] * LANES)


def _splat(builder: ir.IRBuilder, scalar: ir.Value) -> ir.Value:
    empty = ir.Constant(ir.VectorType(scalar.type, LANES), ir.Undefined)
    one = builder.insert_element(empty, scalar, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, empty, ir.Constant(_INTS, [0] * LANES))


def _call(builder: ir.IRBuilder, name: str, *args: ir.Value) -> ir.Value:
    """Call an LLVM intrinsic whose arguments and result are float vectors."""
    function_type = ir.FunctionType(_FLOATS, [_FLOATS] * len(args))
    function = cgutils.get_or_insert_function(builder.module, function_type, f"llvm.{name}.v{LANES}f32")
    return builder.call(function, args)


def _define_operator(function: Any, instruction: str) -> None:
    """Let ``function`` take two vectors, or a vector and a float."""

    @infer_global(function)
    class _Typing(AbstractTemplate):
        def generic(self, args: tuple[Any, ...], kws: dict[str, Any]) -> Any:
            if len(args) == 2 and vector in args and all(a == vector or isinstance(a, types.Number) for a in args):
                return signature(vector, *(a if a == vector else types.float32 for a in args))
            return None

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: tuple[ir.Value, ...]) -> ir.Value:
        operands = [a if kind == vector else _splat(builder, a) for a, kind in zip(args, sig.args, strict=True)]
        return getattr(builder, instruction)(*operands, flags=("contract",))  # contract: a * b + c becomes one fma

    for kinds in ((vector, vector), (vector, types.float32), (types.float32, vector)):
        lower_builtin(function, *kinds)(lower)


for _function, _instruction in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _define_operator(_function, _instruction)
for _function, _instruction in ((operator.iadd, "fadd"), (operator.isub, "fsub"), (operator.imul, "fmul")):
    _define_operator(_function, _instruction)


def _upper_halves(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Return the bits of ``value`` as bfloat16, rounded to nearest, ties to even; NaN stays NaN."""
    bits = builder.bitcast(value, _INTS)
    odd = builder.and_(builder.lshr(bits, _constant(16, _INTS)), _constant(1, _INTS))
    rounded = builder.add(builder.add(bits, _constant(0x7FFF, _INTS)), odd)
    quiet_nan = builder.or_(bits, _constant(0x400000, _INTS))
    is_nan = builder.fcmp_unordered("uno", value, value)
    return builder.lshr(builder.select(is_nan, quiet_nan, rounded), _constant(16, _INTS))


@intrinsic
def splat(typing_context: Any, value: Any) -> Any:
    """Return a vector with ``value`` in every lane."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return _splat(builder, context.cast(builder, args[0], sig.args[0], types.float32))

    return vector(value), generate


@intrinsic(prefer_literal=True)
def stack(typing_context: Any, count: Any) -> Any:
    """Return the address of room for ``count`` (a constant) vectors, which lives until the calling function returns."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        room = cgutils.alloca_once(builder, _FLOATS, size=ir.Constant(ir.IntType(64), count.literal_value))
        return builder.ptrtoint(room, ir.IntType(64))

    return (types.int64(count), generate) if isinstance(count, types.IntegerLiteral) else None


@intrinsic
def load_float(typing_context: Any, address: Any) -> Any:
    """Read one float32."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.load(builder.inttoptr(args[0], ir.FloatType().as_pointer()), align=4)

    return types.float32(types.int64), generate


@intrinsic
def load_int(typing_context: Any, address: Any) -> Any:
    """Read one int32."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.load(builder.inttoptr(args[0], ir.IntType(32).as_pointer()), align=4)

    return types.int32(types.int64), generate


@intrinsic
def load_int64(typing_context: Any, address: Any) -> Any:
    """Read one int64."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.load(builder.inttoptr(args[0], ir.IntType(64).as_pointer()), align=8)

    return types.int64(types.int64), generate


@intrinsic
def store_float(typing_context: Any, address: Any, value: Any) -> Any:
    """Write one float32."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        builder.store(args[1], builder.inttoptr(args[0], ir.FloatType().as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), generate


@intrinsic
def load(typing_context: Any, address: Any) -> Any:
    """Read a vector of float32."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.load(builder.inttoptr(args[0], _FLOATS.as_pointer()), align=4)

    return vector(types.int64), generate


@intrinsic
def store(typing_context: Any, address: Any, value: Any) -> Any:
    """Write a vector of float32."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        builder.store(args[1], builder.inttoptr(args[0], _FLOATS.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, vector), generate


@intrinsic
def prefetch(typing_context: Any, address: Any) -> Any:
    """Ask for the cache line at ``address``, which need not be valid."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        byte, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
        function_type = ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag])
        function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0")
        read, keep, data = (ir.Constant(flag, value) for value in (0, 3, 1))
        builder.call(function, [builder.inttoptr(args[0], byte), read, keep, data])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def load_bfloat16(typing_context: Any, address: Any) -> Any:
    """Read a vector of bfloat16, the upper halves of float32."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        halves = builder.load(builder.inttoptr(args[0], _HALVES.as_pointer()), align=2)
        return builder.bitcast(builder.shl(builder.zext(halves, _INTS), _constant(16, _INTS)), _FLOATS)

    return vector(types.int64), generate


@intrinsic
def store_bfloat16(typing_context: Any, address: Any, value: Any) -> Any:
    """Write a vector as bfloat16, rounded to nearest, ties to even; NaN stays NaN."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        upper = _upper_halves(builder, args[1])
        pointer = builder.inttoptr(args[0], _HALVES.as_pointer())
        builder.store(builder.trunc(upper, _HALVES), pointer, align=2)
        return context.get_dummy_value()

    return types.void(types.int64, vector), generate


@intrinsic
def store_bfloat16_float(typing_context: Any, address: Any, value: Any) -> Any:
    """Write one float32 as bfloat16, rounded as `store_bfloat16` does."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        upper = builder.extract_element(
            _upper_halves(builder, _splat(builder, args[1])), ir.Constant(ir.IntType(32), 0)
        )
        pointer = builder.inttoptr(args[0], ir.IntType(16).as_pointer())
        builder.store(builder.trunc(upper, ir.IntType(16)), pointer, align=2)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), generate


@intrinsic
def round_bfloat16(typing_context: Any, value: Any) -> Any:
    """Return ``value`` as bfloat16 would keep it."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.bitcast(builder.shl(_upper_halves(builder, args[0]), _constant(16, _INTS)), _FLOATS)

    return vector(vector), generate


@intrinsic
def total(typing_context: Any, value: Any) -> Any:
    """Return the sum of the lanes as a float32."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        function_type = ir.FunctionType(ir.FloatType(), [ir.FloatType(), _FLOATS])
        name = f"llvm.vector.reduce.fadd.v{LANES}f32"
        function = cgutils.get_or_insert_function(builder.module, function_type, name)
        zero = ir.Constant(ir.FloatType(), -0.0)
        return builder.call(function, [zero, args[0]], fastmath=("reassoc",))  # a fixed tree, not lane after lane

    return types.float32(vector), generate


@intrinsic
def greatest(typing_context: Any, value: Any) -> Any:
    """Return the greatest lane as a float32; NaN is passed over."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        function_type = ir.FunctionType(ir.FloatType(), [_FLOATS])
        name = f"llvm.vector.reduce.fmax.v{LANES}f32"
        return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), [args[0]])

    return types.float32(vector), generate


@intrinsic
def clamp(typing_context: Any, value: Any, lowest: Any, highest: Any) -> Any:
    """Return ``value`` limited to [lowest, highest]; NaN stays NaN."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        value, lowest, highest = args[0], _splat(builder, args[1]), _splat(builder, args[2])
        value = builder.select(builder.fcmp_ordered(">", lowest, value), lowest, value)
        return builder.select(builder.fcmp_ordered("<", highest, value), highest, value)

    return vector(vector, types.float32, types.float32), generate


@intrinsic
def absolute(typing_context: Any, value: Any) -> Any:
    """Return |value|."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return _call(builder, "fabs", args[0])

    return vector(vector), generate


@intrinsic
def where_negative(typing_context: Any, condition: Any, yes: Any, no: Any) -> Any:
    """Return ``yes`` where ``condition`` < 0, else ``no``."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.select(builder.fcmp_ordered("<", args[0], _constant(0.0)), args[1], args[2])

    return vector(vector, vector, vector), generate


@intrinsic
def _nearest(typing_context: Any, value: Any) -> Any:
    """Return ``value`` rounded to an integer, ties to even."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return _call(builder, "rint", args[0])

    return vector(vector), generate


@intrinsic
def _scale(typing_context: Any, value: Any, exponent: Any) -> Any:
    """Return ``value * 2**exponent`` for whole exponents that keep ``value`` a normal number."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        shift = builder.shl(builder.fptosi(args[1], _INTS), _constant(23, _INTS))
        return builder.bitcast(builder.add(builder.bitcast(args[0], _INTS), shift), _FLOATS)

    return vector(vector, vector), generate


@intrinsic
def _fused(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """Return ``a * b + c`` rounded once."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return _call(builder, "fma", *args)

    return vector(vector, vector, vector), generate


LOG2_E = np.float32(1.4426950408889634)
_LOG2_E_REST = np.float32(1.925963033500811e-08)  # what float32 leaves out of it
_LOWEST, _HIGHEST = np.float32(-126.0), np.float32(126.99)  # exponents of normal numbers
_HALF, _ONE, _TWO = np.float32(0.5), np.float32(1.0), np.float32(2.0)
# Minimax fits of smallest relative error: 2**r on [-1/2, 1/2] (9e-8), and artanh(s) / s in s**2 on [0, 1/9] (5e-9)
_E1, _E2, _E3 = np.float32(0.693146978), np.float32(0.240222421), np.float32(0.0555073374)
_E4, _E5 = np.float32(0.00967151318), np.float32(0.00132647288)
_L1, _L2, _L3, _L4 = np.float32(0.333332081), np.float32(0.200107637), np.float32(0.140009005), np.float32(0.140060048)


@njit
def _power(r, whole):
    """Return 2**(r + whole) for r in [-1/2, 1/2]."""
    return _scale(((((r * _E5 + _E4) * r + _E3) * r + _E2) * r + _E1) * r + _ONE, whole)


@njit
def exp2(value):
    """Return 2**value, limited to [2**-126, 2**127)."""
    value = clamp(value, _LOWEST, _HIGHEST)
    whole = _nearest(value)
    return _power(value - whole, whole)


@njit
def exp(value):
    """Return e**value, limited as `exp2`; the exponent is reduced exactly, so the error does not grow with it."""
    whole = _nearest(clamp(value * LOG2_E, _LOWEST + _ONE, _HIGHEST))
    r = _fused(value, splat(LOG2_E), splat(0.0) - whole) + value * _LOG2_E_REST
    return _power(clamp(r, -_HALF, _HALF), whole)  # the clamp acts only where the exponent was limited


@njit
def sigmoid(value):
    """Return 1 / (1 + exp(-value))."""
    return splat(1.0) / (exp(splat(0.0) - value) + _ONE)


@njit
def softplus(value):
    """Return log(1 + exp(value)), with small relative error also where the result is tiny."""
    e = exp(splat(0.0) - absolute(value))
    s = e / (e + _TWO)  # log(1 + e) = 2 artanh(s), s <= 1/3
    q = s * s
    series = (((q * _L4 + _L3) * q + _L2) * q + _L1) * q + _ONE
    return where_negative(value, splat(0.0), value) + s * series * _TWO

"""Vectors of 16-bit and 32-bit integers for numba kernels: the products of quantised weights; see `simd`.

``words`` are ``2 * LANES`` numbers of 16 bits, ``ints`` are ``LANES`` numbers of 32 bits: one register each. The
product of two ``words``, summed in pairs, is one instruction of every x86 processor since SSE2 (with VNNI its sum is in
it); elsewhere LLVM makes it of plain products. Its result is exact, so sums of it are the same everywhere.
"""

# mypy: allow-untyped-defs
# (numba infers the types of compiled functions)

from __future__ import annotations

from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from mambacus.ops.simd import LANES, vector

_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_INTS = ir.VectorType(ir.IntType(32), LANES)
_WORDS = ir.VectorType(ir.IntType(16), 2 * LANES)
_HALF_WORDS = ir.VectorType(ir.IntType(16), LANES)


class _IntegersType(types.Type):
    """The numba type of a vector of integers."""

    def __init__(self, name: str, layout: ir.VectorType) -> None:
        super().__init__(name=f"mambacus_{name}{layout.count}")
        self.layout = layout


@register_model(_IntegersType)
class _IntegersModel(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: _IntegersType) -> None:
        super().__init__(manager, numba_type, numba_type.layout)


words = _IntegersType("words", _WORDS)
ints = _IntegersType("ints", _INTS)


def pair_instruction() -> str | None:
    """Return the name of this machine's instruction for `multiply_pairs`, None if LLVM has to find its own."""
    features = get_host_cpu_features()
    if LANES == 16 and features.get("avx512bw", False):
        return "llvm.x86.avx512.pmaddw.d.512"
    if LANES == 8 and features.get("avx2", False):
        return "llvm.x86.avx2.pmadd.wd"
    return None


def _half(builder: ir.IRBuilder, value: ir.Value, first: int) -> ir.Value:
    """Return the words [first, first + LANES) as 32-bit integers."""
    lanes = ir.Constant(_INTS, list(range(first, first + LANES)))
    return builder.sext(builder.shuffle_vector(value, value, lanes), _INTS)


@intrinsic
def load_words(typing_context: Any, address: Any) -> Any:
    """Read ``2 * LANES`` integers of 16 bits."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.load(builder.inttoptr(args[0], _WORDS.as_pointer()), align=2)

    return words(types.int64), generate


@intrinsic
def store_rounded(typing_context: Any, address: Any, value: Any) -> Any:
    """Write a vector of float32 as integers of 16 bits, rounded to nearest, ties to even."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        rint = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_FLOATS, [_FLOATS]), f"llvm.rint.v{LANES}f32"
        )
        whole = builder.fptosi(builder.call(rint, [args[1]]), _INTS)
        builder.store(builder.trunc(whole, _HALF_WORDS), builder.inttoptr(args[0], _HALF_WORDS.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.void(types.int64, vector), generate


@intrinsic(prefer_literal=True)
def top_bits(typing_context: Any, value: Any, first: Any, count: Any) -> Any:
    """Return the signed numbers in the bits [first, first + count) (constants) of every word, at its top.

    That is ``2**(16 - count)`` times the number, which saves a shift.
    """

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        bits, left = count.literal_value, 16 - first.literal_value - count.literal_value
        shifted = builder.shl(args[0], ir.Constant(_WORDS, [left] * 2 * LANES)) if left else args[0]
        mask = ir.Constant(_WORDS, [(1 << 16) - (1 << (16 - bits))] * 2 * LANES)
        return builder.and_(shifted, mask) if first.literal_value else shifted

    return words(words, first, count), generate


@intrinsic
def multiply_pairs(typing_context: Any, a: Any, b: Any) -> Any:
    """Return the products of the words of ``a`` and ``b``, summed in pairs."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        name = pair_instruction()
        if name is not None:
            kind = ir.FunctionType(_INTS, [_WORDS, _WORDS])
            return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)
        lower, upper = (builder.mul(*(_half(builder, arg, first) for arg in args)) for first in (0, LANES))
        return builder.add(lower, upper)

    return ints(words, words), generate


@intrinsic
def add_ints(typing_context: Any, a: Any, b: Any) -> Any:
    """Return ``a + b``."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.add(*args)

    return ints(ints, ints), generate


@intrinsic
def to_floats(typing_context: Any, value: Any) -> Any:
    """Return 32-bit integers as float32."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.sitofp(args[0], _FLOATS)

    return vector(ints), generate


@intrinsic(prefer_literal=True)
def half_to_floats(typing_context: Any, value: Any, half: Any) -> Any:
    """Return the lower (``half`` 0) or upper (1) half of ``words`` as float32."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.sitofp(_half(builder, args[0], half.literal_value * LANES), _FLOATS)

    return vector(words, half), generate


@intrinsic
def load_scales(typing_context: Any, address: Any) -> Any:
    """Read two bfloat16 numbers into every lane, for `first_scale` and `second_scale`."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        pair = builder.load(builder.inttoptr(args[0], ir.IntType(32).as_pointer()), align=2)
        empty = ir.Constant(_INTS, ir.Undefined)
        one = builder.insert_element(empty, pair, ir.Constant(ir.IntType(32), 0))
        return builder.shuffle_vector(one, empty, ir.Constant(_INTS, [0] * LANES))

    return ints(types.int64), generate


@intrinsic
def first_scale(typing_context: Any, pair: Any) -> Any:
    """Return the first of two bfloat16 numbers as a vector of float32."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.bitcast(builder.shl(args[0], ir.Constant(_INTS, [16] * LANES)), _FLOATS)

    return vector(ints), generate


@intrinsic
def second_scale(typing_context: Any, pair: Any) -> Any:
    """Return the second of two bfloat16 numbers as a vector of float32."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.bitcast(builder.and_(args[0], ir.Constant(_INTS, [0xFFFF0000] * LANES)), _FLOATS)

    return vector(ints), generate

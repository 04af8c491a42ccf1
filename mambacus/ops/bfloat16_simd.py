"""Vectors of pairs of bfloat16 numbers for numba kernels: products that are summed in float32; see `simd`.

``ints`` are ``LANES`` numbers of 32 bits, here each a pair of neighbours. AVX512_BF16 multiplies two of them and adds
the sums of pairs to a vector in one instruction; elsewhere LLVM makes it of plain products, slower than widening, so
that tests run anywhere. The instruction takes numbers below 2**-126 for zeros, in its inputs and in its sums; else the
products are exact and sums are rounded to nearest.
"""

# mypy: allow-untyped-defs
# (numba infers the types of compiled functions)

from __future__ import annotations

from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from mambacus.ops.integer_simd import ints
from mambacus.ops.simd import LANES, vector

_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_INTS = ir.VectorType(ir.IntType(32), LANES)
INSTRUCTION = "llvm.x86.avx512bf16.dpbf16ps.512"


def multiplies_pairs() -> bool:
    """Tell whether this machine has an instruction for `add_products`."""
    return LANES == 16 and get_host_cpu_features().get("avx512bf16", False)


@intrinsic
def load_pairs(typing_context: Any, address: Any) -> Any:
    """Read ``LANES`` pairs."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.load(builder.inttoptr(args[0], _INTS.as_pointer()), align=2)

    return ints(types.int64), generate


@intrinsic(prefer_literal=True)
def repeat_pairs(typing_context: Any, address: Any, count: Any) -> Any:
    """Read ``count`` pairs (a constant) and repeat them in all lanes."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        # As floats: LLVM makes the repetition of one number a part of the product's instruction for these only.
        kind = ir.VectorType(ir.FloatType(), count.literal_value)
        found = builder.load(builder.inttoptr(args[0], kind.as_pointer()), align=2)
        lanes = ir.Constant(_INTS, [lane % count.literal_value for lane in range(LANES)])
        return builder.bitcast(builder.shuffle_vector(found, ir.Constant(kind, ir.Undefined), lanes), _INTS)

    return ints(types.int64, count), generate


@intrinsic(prefer_literal=True)
def copy_pairs(typing_context: Any, source: Any, target: Any, count: Any) -> Any:
    """Copy ``count`` pairs (a constant) from one address to another."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        pointer = ir.VectorType(ir.IntType(32), count.literal_value).as_pointer()
        found = builder.load(builder.inttoptr(args[0], pointer), align=2)
        builder.store(found, builder.inttoptr(args[1], pointer), align=2)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, count), generate


@intrinsic
def copy_bfloat16(typing_context: Any, source: Any, target: Any) -> Any:
    """Copy one number from one address to another."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        pointer = ir.IntType(16).as_pointer()
        found = builder.load(builder.inttoptr(args[0], pointer), align=2)
        builder.store(found, builder.inttoptr(args[1], pointer), align=2)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def add_products(typing_context: Any, total: Any, a: Any, b: Any) -> Any:
    """Return ``total`` and, in every lane, the products of the pairs of ``a`` and ``b``."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        if multiplies_pairs():
            kind = ir.FunctionType(_FLOATS, [_FLOATS, _INTS, _INTS])  # LLVM makes its own vectors of bfloat16 of these
            return builder.call(cgutils.get_or_insert_function(builder.module, kind, INSTRUCTION), args)
        result, pairs = args[0], args[1:]
        shift, mask = ir.Constant(_INTS, [16] * LANES), ir.Constant(_INTS, [0xFFFF0000] * LANES)
        for number in (lambda pair: builder.and_(pair, mask), lambda pair: builder.shl(pair, shift)):
            factors = (builder.bitcast(number(pair), _FLOATS) for pair in pairs)
            result = builder.fadd(result, builder.fmul(*factors, flags=("contract",)), flags=("contract",))
        return result

    return vector(vector, ints, ints), generate


@intrinsic(prefer_literal=True)
def add_lanes(typing_context: Any, value: Any, distance: Any) -> Any:
    """Return the sum of each lane and its partner at ``distance`` (a constant), a power of two."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        partners = ir.Constant(_INTS, [lane ^ distance.literal_value for lane in range(LANES)])
        return builder.fadd(args[0], builder.shuffle_vector(args[0], args[0], partners))

    return vector(vector, distance), generate

"""The CUDA C++ kernels on the CPU: compiled by g++ with ``cuda_emulator.h`` in place of a GPU.

This finds wrong results, missing barriers and unwritten memory; a GPU alone shows whether NVRTC takes the source and
how fast it is (``test_ops_gpu.py``).
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from guarded_memory import guard, guarded
from kernel_checks import (
    SCAN_NAMES,
    STEP_SHAPES,
    conv_inputs,
    document_ids,
    hold_conv,
    hold_cross_entropy,
    hold_likeliest,
    hold_linear_cross_entropy,
    hold_norm,
    hold_scan,
    hold_step,
    poisoned_memory,
    scan_inputs,
    step_weights,
)
from stepped_models import errors, hold_errors, wandering_model
from torch import Tensor

from mambacus.inference.decoder import BUCKETS, Decoder
from mambacus.inference.fused import step_weights as weights_of
from mambacus.ops import nvrtc
from mambacus.ops.causal_conv1d import gpu_cuda as conv
from mambacus.ops.cross_entropy import gpu as loss
from mambacus.ops.cross_entropy import interface
from mambacus.ops.decode_step import StepWeights
from mambacus.ops.decode_step import gpu as step
from mambacus.ops.likeliest import gpu as likeliest
from mambacus.ops.linear import dropout
from mambacus.ops.rms_norm import gpu as norm
from mambacus.ops.selective_scan import gpu as scan_gpu
from mambacus.ops.selective_scan import gpu_cuda as scan
from mambacus.ops.selective_scan.reference import selective_scan_ref

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
CHUNK = 32
INSTRUCTIONS = {  # of the GPU, and what they do
    "cvt.f32.f16": "value = (float)*(_Float16*)&bits;",
    "cvt.rn.f16x2.f32": "word = narrow_f16(low) | (unsigned)narrow_f16(high) << 16;",
    "cvt.rn.bf16x2.f32": "word = narrow_bf16(low) | (unsigned)narrow_bf16(high) << 16;",
    "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32": "mma(d, a[0], a[1], a[2], a[3], b0, b1);",
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": "mma_bf16(d, a0, a1, a2, a3, b0, b1);",
    "ld.global.nc.L1::no_allocate.v4.u32": "w = *(const Words*)place;",
    "createpolicy.fractional.L2::evict_first.b64": "",
    "ld.global.L1::no_allocate.L2::cache_hint.v4.u32": "w = *(const Words*)place;",
    "st.global.L2::cache_hint.v4.f32": "place[0] = v[0]; place[1] = v[1]; place[2] = v[2]; place[3] = v[3];",
    "ld.global.cg.v4.u32": "w = *(const Words*)place;",
    "ld.global.cg.f32": "value = *place;",
    "ld.global.cg.u32": "word = *(const unsigned*)place;",
    "ld.global.cg.u16": "bits = *(const unsigned short*)place;",
    "griddepcontrol.launch_dependents": "",
    "griddepcontrol.wait": "",
    "cp.async.bulk.prefetch.L2.global": "",
    "ex2.approx.ftz.f32": "y = exp2f(x);",
    "rcp.approx.ftz.f32": "y = 1.0f / x;",
}


def translate(source: str) -> str:
    """Return C++ for g++: GPU instructions replaced, and a ``launch_`` function added for each kernel."""
    for instruction, code in INSTRUCTIONS.items():
        source = re.sub(rf'asm( volatile)?\("{re.escape(instruction)}[^;]*;"[^;]*;', code, source)
    assert not re.search(r"\basm\b", source)
    source = source.replace(
        "extern __shared__ __align__(16) float memory[];", "float* memory = (float*)dynamic_memory;"
    )
    kernel = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\(const Args p\) \{')
    launch = (
        r'struct Args; static void \1_body(const Args&); extern "C" void launch_\1(const void* args, int x, int y, '
        r"int z, int threads, int shared_bytes) { emulator::launch([](const void* a) { \1_body(*(const Args*)a); }, "
        r"args, {x, y, z}, threads, shared_bytes); } static void \1_body(const Args& p) {"
    )
    return f'#include "{Path(__file__).with_name("cuda_emulator.h")}"\n' + kernel.sub(launch, source)


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[nvrtc.Program], ctypes.CDLL]:
    folder = tmp_path_factory.mktemp("cuda")

    @functools.cache
    def compile_program(program: nvrtc.Program) -> ctypes.CDLL:
        stem = folder / str(len(list(folder.glob("*.cpp"))))
        stem.with_suffix(".cpp").write_text(translate(program.source))
        command = ["g++", "-O0", "-w", "-shared", "-fPIC", "-std=c++17", *(f"-D{macro}" for macro in program.macros)]
        library = stem.with_suffix(".so")
        done = subprocess.run([*command, f"{stem}.cpp", "-o", library], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return ctypes.CDLL(str(library))

    return compile_program


@pytest.fixture(autouse=True)
def _emulated(build: Callable[[nvrtc.Program], ctypes.CDLL], monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(
        program: nvrtc.Program, name: str, shared_bytes: int = 0, *, overlaps: bool = False
    ) -> Callable[..., None]:
        function = getattr(build(program), f"launch_{name}")
        return lambda grid, threads, arguments: function(ctypes.byref(arguments), *grid, threads, shared_bytes)

    monkeypatch.setattr(nvrtc.Program, "kernel", kernel)
    monkeypatch.setattr(conv, "_THREADS", 32)
    monkeypatch.setattr(conv, "_multiprocessors", lambda device: 2)


def hold(
    inputs: dict[str, Any], forward_plan: scan.Plan, backward_plan: scan.Plan, keeps: bool = True, **options: Any
) -> None:
    """With ``keeps`` the backward pass is given y, where it reads it. No kernel may read past an input."""
    y = None

    def forward(*args: Any) -> tuple[Tensor, ...]:
        nonlocal y
        found = scan.forward(scan.Inputs.of(*args[:10]), args[10], args[11], forward_plan, CHUNK)
        y = found[0] if keeps and scan.reads_output(args[0], args[6]) else None
        return found

    def backward(grad_y: Tensor, grad_final: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
        i = scan.Inputs.of(*args[:10])
        place = None
        if i.z is not None:  # every other row of memory that is twice as wide
            place = torch.empty(*i.z.shape[:2], 2 * i.z.shape[2], dtype=i.z.dtype)[..., i.z.shape[2] :]
        grads = scan.backward(
            i, guarded(grad_y), grad_final, args[11], backward_plan, CHUNK, wants_initial=args[10] is not None,
            grad_z=place, y=y,
        )  # fmt: skip
        given = (*args[:8], args[10])
        return tuple(torch.empty(0) if a is None else g.to(a.dtype) for g, a in zip(grads, given, strict=True))

    hold_scan(forward, backward, guard(inputs), **options)


WHOLE = 1 << 20


def reference(*args: Any) -> tuple[Tensor, Tensor]:
    """The reference with the arguments of `scan_gpu.scan`."""
    return selective_scan_ref(*args[:7], delta_bias=args[7], delta_softplus=args[8])


def closed_gates(inputs: dict[str, Any]) -> dict[str, Any]:
    """Set some gates to zero, or nearly: y does not tell there what was before the gate."""
    z = inputs["z"].clone()
    z[:, ::3, ::7], z[:, 1::3, ::11] = 0.0, -1e-30
    return inputs | {"z": z}


@pytest.mark.parametrize(
    ("forward", "backward"),
    [
        (scan.Plan(4, 16, 1, WHOLE), scan.Plan(4, 16, 1, WHOLE)),
        (scan.Plan(2, 32, 6, 64), scan.Plan(4, 8, 1, 64)),
        (scan.Plan(8, 32, 1, 32), scan.Plan(8, 16, 1, 32)),
        (scan.Plan(4, 16, 1, WHOLE), scan.Plan(4, 16, 1, 64, sets=2)),
        (scan.Plan(4, 16, 1, WHOLE), scan.Plan(4, 8, 1, WHOLE, sets=3)),
    ],
    ids=["whole", "short tiles, segments", "eight warps, segments", "two sets, segments", "a set too many"],
)
@pytest.mark.parametrize("keeps", [True, False])
def test_scan_with_documents(forward: scan.Plan, backward: scan.Plan, keeps: bool) -> None:
    seq_idx = document_ids(5, 75)
    hold(closed_gates(scan_inputs((5, 75, 40, 5), seq_idx=seq_idx)), forward, backward, keeps, seq_idx=seq_idx)


def test_closed_gates_are_seen() -> None:
    """Without the sums again the gradient of a closed gate would be 0 or NaN."""
    plan = scan.Plan(4, 16, 1, WHOLE)
    inputs = closed_gates(scan_inputs((2, 75, 64, 16)))
    hold(inputs, plan, plan)
    order = [inputs[name] for name in SCAN_NAMES[:8]]
    found = []
    for keeps in (True, False):
        i = scan.Inputs.of(*order, True, None)
        y, _, chunks = scan.forward(i, None, True, plan, CHUNK)
        grads = scan.backward(i, torch.ones_like(y), None, chunks, plan, CHUNK, wants_initial=False,
                              y=y if keeps else None)  # fmt: skip
        found.append(grads[6][inputs["z"].abs() < 1e-20])
    assert len(found[0]) > 100 and found[1].abs().min() > 0
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("d_state", [17, 33])
def test_scan_of_many_states(d_state: int) -> None:
    plan = scan.Plan(4, 16, 1, WHOLE)
    hold(scan_inputs((1, 37, 40, d_state)), plan, plan)


@pytest.mark.parametrize("names", [("x", "delta"), ("z",), ("B", "C")])
def test_scan_of_tokens_far_apart(names: tuple[str, ...]) -> None:
    """A chunk of them spans more bytes than 32 bits count."""
    inputs = scan_inputs((1, 24, 32, 5))
    for name in names:
        tensor = inputs[name]
        memory = torch.from_numpy(np.empty((24 << 26) + 64, dtype=np.float32))  # of which few pages are touched
        far = memory.as_strided(tensor.shape, (24 << 26, 1 << 26, 1)).copy_(tensor)
        inputs[name] = far.detach().requires_grad_(tensor.requires_grad)
    plan = scan.Plan(4, 16, 1, WHOLE)
    hold(inputs, plan, plan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("d_inner", "sets"), [(64, 1), (96, 2), (128, 2)])
def test_scan_whole_blocks(dtype: torch.dtype, d_inner: int, sets: int) -> None:
    plan = scan.Plan(4, 16, 1, WHOLE)
    hold(scan_inputs((1, 37, d_inner, 16), dtype), plan, dataclasses.replace(plan, sets=sets))


@pytest.mark.parametrize("trained", [True, False])
def test_y_is_kept_where_the_scan_is_trained(monkeypatch: pytest.MonkeyPatch, trained: bool) -> None:
    plan, given = scan.Plan(4, 16, 1, WHOLE), []

    def backward(*args: Any, y: Tensor | None, **options: Any) -> tuple[Tensor, ...]:
        given.append(y)
        return right(*args, y=y, **options)

    right = scan.backward
    monkeypatch.setattr(scan, "backward", backward)
    monkeypatch.setattr(scan, "forward_plan", lambda *_: plan)
    monkeypatch.setattr(scan, "backward_plan", lambda *_: plan)
    monkeypatch.setattr(scan_gpu, "implementation", lambda *_: ("cuda", "emulated"))
    inputs = closed_gates(scan_inputs((2, 70, 64, 16), torch.bfloat16, absent=("initial_state",)))
    grads = []
    for function in (scan_gpu.scan, reference):
        leaves = [inputs[name].detach().requires_grad_(name != "A" or trained) for name in SCAN_NAMES[:8]]
        y, _ = function(*leaves, True, None, None, True)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        grads.append((y, *torch.autograd.grad(y, wanted, torch.ones_like(y))))
    assert (given[0] is not None) == trained and len(given) == 1
    for ours, theirs in zip(*grads, strict=True):
        assert (ours - theirs).norm() <= 1e-2 * theirs.norm()


@pytest.mark.parametrize(
    ("shape", "d_state", "gpu", "expected"),
    [
        ((4, 2048, 4096), 16, "h100", (16, 2)),
        ((8, 2048, 2048), 16, "h100", (16, 2)),
        ((8, 2048, 1536), 16, "h100", (8, 1)),  # all blocks at once
        ((8, 2048, 3072), 16, "h100", (16, 1)),  # three rounds of blocks would become four
        ((4, 2048, 4096), 64, "h100", (16, 1)),  # two blocks would not fit
        ((4, 2048, 4096), 16, "a100", (16, 1)),
    ],
)
def test_sets_of_channels_fill_whole_rounds_of_blocks(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int], d_state: int, gpu: str, expected: tuple[int, int]
) -> None:
    multiprocessors, shared = {"h100": (132, 228 << 10), "a100": (108, 164 << 10)}[gpu]
    monkeypatch.setattr(scan, "_multiprocessors", lambda device: multiprocessors)
    monkeypatch.setattr(scan, "_shared_bytes", lambda device: shared)
    plan = scan.backward_plan.__wrapped__(shape, d_state, 64, 0, True, 2)
    assert (plan.tile, plan.sets) == expected
    assert scan.backward_plan.__wrapped__(shape, d_state, 64, 0, False, 2).sets == 1


def test_scan_without_options() -> None:
    plan = scan.Plan(4, 16, 1, WHOLE)
    inputs = scan_inputs((2, 33, 20, 1), absent=("D", "z", "delta_bias", "initial_state"))
    hold(inputs | {"delta": inputs["delta"].abs()}, plan, plan, softplus=False, with_final=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conv_with_documents(dtype: torch.dtype) -> None:
    seq_idx = document_ids(5, 45)
    inputs = conv_inputs((5, 45, 20, 4), dtype, seq_idx=seq_idx)
    hold_conv(conv.forward, conv.backward, inputs, seq_idx=seq_idx)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alike", [True, False])
def test_conv_takes_a_gradient_in_two_parts(dtype: torch.dtype, alike: bool) -> None:
    def backward(grad_y: Tensor, *args: Any) -> tuple[Tensor, ...]:
        twin = grad_y / 2 if alike else torch.stack([grad_y / 2] * 2, dim=-1)[..., 0]
        return conv.backward(grad_y / 2, *args, None, twin)

    seq_idx = document_ids(5, 45)
    inputs = conv_inputs((5, 45, 20, 4), dtype, seq_idx=seq_idx, absent=("initial_state",))
    hold_conv(conv.forward, backward, inputs, seq_idx=seq_idx)


@pytest.mark.parametrize("types", [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)], ids=str)
def test_conv_reads_taps_and_bias_in_their_own_dtype(types: tuple[torch.dtype, torch.dtype]) -> None:
    inputs = conv_inputs((2, 45, 20, 4), torch.bfloat16)
    x, weight, bias, state = (
        inputs["x"],
        inputs["weight"].to(types[0]),
        inputs["bias"].to(types[1]),
        inputs["initial_state"],
    )
    narrow, wide = (weight, bias), (weight.float(), bias.float())
    grad = torch.randn(x.shape).to(x.dtype)
    for one, other in zip(conv.forward(x, *narrow, True, None, state), conv.forward(x, *wide, True, None, state),
                          strict=True):  # fmt: skip
        assert torch.equal(one, other)
    back = [conv.backward(grad, None, x, *each, True, None, state) for each in (narrow, wide)]
    assert all(map(torch.equal, *back))


@pytest.mark.parametrize("plan", [conv.Plan(4, 4, 32), conv.Plan(2, 8, 16), conv.Plan(1, 1, 128)], ids=str)
def test_conv_launches(plan: conv.Plan) -> None:
    inputs = conv_inputs((2, 70, 20, 4), torch.bfloat16)
    hold_conv(conv.forward, functools.partial(conv.backward, plan=plan), inputs)


def test_conv_runs_fill_whole_rounds_of_blocks() -> None:
    rounds = {shape: conv.backward_plan(shape, 132).run for shape in ((8, 2048, 1536 // 4), (4, 2048, 4096 // 4))}
    assert rounds == {(8, 2048, 384): 32, (4, 2048, 1024): 128}  # blocks of 32 threads here, 128 on a GPU


@pytest.mark.parametrize("shape", [(2, 40, 33, 4), (2, 2, 30, 5), (1, 9, 30, 1)])
def test_conv_shapes(shape: tuple[int, int, int, int]) -> None:
    def backward(*args: Any) -> tuple[Tensor, ...]:
        batch, seqlen, d_inner = args[2].shape
        return conv.backward(*args, torch.empty(batch, seqlen, 2 * d_inner)[..., :d_inner])

    hold_conv(conv.forward, backward, conv_inputs(shape))
    inputs = conv_inputs(shape, absent=("initial_state",))
    hold_conv(conv.forward, conv.backward, inputs, with_final=False, silu=False)


@pytest.mark.parametrize(
    ("shape", "with_added", "dtype", "weight_dtype", "y_dtype"),
    [
        ((9, 128), True, torch.float32, torch.float32, torch.bfloat16),
        ((3, 70), False, torch.float16, torch.float16, torch.float16),
        ((3, 70), True, torch.float32, torch.float32, torch.float32),
        ((5, 1200), True, torch.float32, torch.bfloat16, torch.bfloat16),
        ((6, 128), True, torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
def test_norm(
    shape: tuple[int, int], with_added: bool, dtype: torch.dtype, weight_dtype: torch.dtype, y_dtype: torch.dtype
) -> None:
    hold_norm(norm.forward, norm.backward, shape, dtype, weight_dtype, y_dtype, with_added=with_added)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_norm_of_a_sum_is_that_of_the_sum_that_is_kept(dtype: torch.dtype) -> None:
    x, added, weight = torch.randn(6, 128).to(dtype), torch.randn(6, 128), torch.randn(128)
    y, total, scale = norm.forward(x, added, weight, 1e-5, torch.float32)
    again, _, scale_again = norm.forward(total, None, weight, 1e-5, torch.float32)
    assert total.dtype == dtype and torch.equal(y, again) and torch.equal(scale, scale_again)


@pytest.mark.parametrize("shape", [(41, 128), (13, 1200)], ids=str)
def test_norm_of_more_rows_than_blocks(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Backwards a block walks through several rounds of rows, as it does in training."""
    monkeypatch.setattr(norm, "_BACKWARD_BLOCKS", 2)
    norm._launch.cache_clear()
    hold_norm(norm.forward, norm.backward, shape, torch.float32, torch.float32, torch.bfloat16, with_added=True)
    norm._launch.cache_clear()


@pytest.mark.parametrize("columns", [1, 70, 4200])
def test_likeliest(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likeliest, "_THREADS", 128)
    hold_likeliest(likeliest.likeliest, columns)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((3, 4200), torch.bfloat16), ((2, 70), torch.float32), ((0, 8), torch.float16)], ids=str
)
def test_cross_entropy(shape: tuple[int, int], dtype: torch.dtype) -> None:
    hold_cross_entropy(loss.cross_entropy_, shape, dtype)


@pytest.mark.parametrize("gradient", [True, False])
def test_a_label_outside_the_vocabulary_is_no_number(gradient: bool) -> None:
    logits, targets = torch.randn(3, 72), torch.tensor([5, 72, -100])
    losses = loss.cross_entropy_(logits, targets, gradient=gradient)
    assert losses[1].isnan() and losses[0] > 0 and losses[2] == 0
    if gradient:
        assert logits[1].isnan().all() and logits[[0, 2]].isfinite().all()


def test_linear_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interface, "ROWS", 4)
    monkeypatch.setattr(interface, "_runs_on_gpu", lambda *_: True)
    hold_linear_cross_entropy(interface.linear_cross_entropy, torch.float32)


def run_few(weights: StepWeights, tokens: Tensor, *states: Tensor) -> Tensor:
    return step.few(weights, step.Shape.of(weights, len(tokens)), tokens, *states)


def run_many(weights: StepWeights, tokens: Tensor, *states: Tensor) -> Tensor:
    conv_state, ssm_state, counts = states
    counts.add_(1)
    return step.many(weights, step.Shape.of(weights, len(tokens)), tokens, conv_state, ssm_state)


@pytest.mark.parametrize("batch", [1, 3, 8, 11, 20, 32, 48])
def test_step_of_few_rows(batch: int) -> None:
    hold_step(run_few, guard(step_weights()), batch)


class EmulatedDecoder(Decoder):
    """Steps the rows of a bucket, as a CUDA graph does, in memory that starts as NaN."""

    def step(self, tokens: Tensor) -> Tensor:
        rows, size = len(tokens), min(size for size in BUCKETS if size >= len(tokens))
        pool, inputs = self._room(size), tokens.new_zeros(size)
        inputs[:rows] = tokens
        weights = weights_of(self._base)
        assert isinstance(weights, StepWeights) and step._misfit(weights, size) is None
        with poisoned_memory():
            logits = run_few(weights, inputs, pool.conv_state[:, :size], pool.ssm_state[:, :size], pool.tokens[:size])
        return logits[:rows]


@pytest.mark.parametrize("rows", [3, 40])
def test_a_decoder_that_steps_a_bucket(rows: int) -> None:
    model = wandering_model()
    hold_errors(*errors(model, EmulatedDecoder(model, model, 64), rows))


def test_a_wrong_row_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model, right = wandering_model(), EmulatedDecoder.step

    def wrong(self: EmulatedDecoder, tokens: Tensor) -> Tensor:
        logits = right(self, tokens)
        logits[39] *= 1.05
        return logits

    monkeypatch.setattr(EmulatedDecoder, "step", wrong)
    found = errors(model, EmulatedDecoder(model, model, 64), 40)
    with pytest.raises(AssertionError):
        hold_errors(*found)


def test_step_with_more_rows_in_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "_THREADS_AT_ONCE", 0)
    hold_step(run_few, guard(step_weights()), 13)  # no other test's number: launches are kept


@pytest.mark.parametrize("sizes", STEP_SHAPES, ids=str)
def test_step_shapes(sizes: dict[str, Any]) -> None:
    hold_step(run_few, guard(step_weights(**sizes)), 2)
    hold_step(run_few, guard(step_weights(**sizes)), 9)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("sizes", [{}, {"d_state": 8, "conv_bias": False}, {"d_model": 160, "dt_rank": 40}], ids=str)
def test_step_of_many_rows(monkeypatch: pytest.MonkeyPatch, sizes: dict[str, Any], own: bool) -> None:
    if not own:
        monkeypatch.setattr(step, "FUSED_ROWS", 0)
    hold_step(run_many, guard(step_weights(**sizes)), 13)


def test_norm_of_a_row_in_several_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "_NORM_THREADS", 32)
    hold_step(run_many, step_weights(d_model=160), 11)  # no other test's number: launches are kept


@pytest.mark.parametrize("kind", ["in", "out", "head"])
def test_prefetch_stays_within_the_next_weight(kind: str) -> None:
    for d_model, vocabulary in ((160, 17), (768, 50280), (2048, 50280), (2560, 50288)):
        shape = step.Shape(d_model, 2 * d_model, 16, 160, vocabulary, True, 1, 0)
        nexts = [2 * 2 * d_model * d_model] if kind == "in" else [2 * 4 * d_model * d_model, 2 * vocabulary * d_model]
        for blocks in (1, 7, 128, 3143):
            share, ahead = step.prefetched(kind, shape, blocks)
            assert share % 16 == ahead % 16 == 0 and 0 <= ahead <= share
            assert blocks * share <= min(nexts) and blocks * ahead <= step.AHEAD[kind]
    share, ahead = step.prefetched("in", step.Shape(2048, 4096, 16, 128, 50280, True, 1, 0), 256)
    assert share == ahead == 65536  # all of out_proj


def test_what_is_prefetched_by_rows_and_size() -> None:
    large, small = (step.Shape(d_model, 2 * d_model, 16, 128, 50280, True, 8, 0) for d_model in (2048, 768))
    assert all(step.prefetched(kind, large, 128)[1] for kind in ("in", "out"))
    assert step.prefetched("in", small, 96)[1] and step.prefetched("out", small, 48)[1] == 0
    many = dataclasses.replace(large, batch=9)
    assert all(step.prefetched(kind, many, 128)[1] == 0 for kind in ("in", "out", "head"))


@pytest.mark.parametrize("kernel", ["convolve", "update"])
def test_what_is_asked_for_stays_within_the_next_weight(kernel: str) -> None:
    for d_model, vocabulary in ((160, 17), (768, 50280), (2048, 50280)):
        shape = step.Shape(d_model, 2 * d_model, 16, 160, vocabulary, True, 9, 0)
        most = 4 * d_model * d_model if kernel == "convolve" else min(8 * d_model * d_model, 2 * vocabulary * d_model)
        for blocks in (1, 7, 128, 3143):
            found = step.asked(kernel, shape, blocks)
            assert found["SHARE"] % 16 == 0 and 1 <= found["ASKERS"] <= blocks
            assert found["ASKERS"] * found["SHARE"] <= min(most, step.ASKED[kernel])
    for batch, asks in ((8, False), (9, True), (32, True), (33, False), (64, False)):
        assert (step.asked(kernel, dataclasses.replace(shape, batch=batch), 128)["SHARE"] > 0) == asks
    assert step.asked(kernel, dataclasses.replace(shape, d_model=1024, d_inner=2048), 128)["SHARE"] == 0


@pytest.mark.parametrize("run", [run_few, run_many])
def test_whoever_asks_is_given_the_next_weight(monkeypatch: pytest.MonkeyPatch, run: Callable[..., Tensor]) -> None:
    """A GPU would be asked for what lies at address 0."""
    monkeypatch.setattr(step, "LEAST_ASKED", 0)
    asked, launch = [], nvrtc.Launch.__call__

    def checked(self: nvrtc.Launch, **tensors: Tensor | None) -> None:
        macros = dict(macro.split("=") for macro in self.program.macros)
        wanted = int(macros.get("ASKERS", 0)) * int(macros.get("SHARE", 0))
        if wanted:
            following = tensors["next"]
            assert following is not None and wanted <= following.nbytes
            asked.append(self.kernel)
        launch(self, **tensors)

    monkeypatch.setattr(nvrtc.Launch, "__call__", checked)
    hold_step(run, guard(step_weights()), 15)  # no other test's number: launches are kept
    assert {*asked} == {"convolve", "update"}


@pytest.mark.parametrize(
    ("shape", "dtype"), [((9, 64), torch.bfloat16), ((5, 13), torch.float32), ((300, 8), torch.float16)], ids=str
)
def test_dropout(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, seed = torch.randn(shape).to(dtype), torch.tensor([(5 << 40) + 11])
    y = torch.full_like(x, torch.nan)
    dropout._launch(nvrtc.layout(x), dropout.kept_share(0.3), None)(x=x, y=y, seed=seed)
    assert torch.equal(y, dropout.drop(x, seed, 0.3))


def test_arguments_match_the_source() -> None:
    """ctypes lays the struct out as the C++ one: same names in the same order."""
    for module in (scan, conv, norm, loss, dropout, step):
        path = module._SOURCE
        body = re.search(r"struct Args \{(.*?)\n\};", path.read_text(), re.S)
        assert body is not None
        lines = [line.split("//")[0].strip() for line in body[1].splitlines()]
        names = re.findall(r"(\w+)\s*[,;]", " ".join(lines))
        assert names == [name for name, _ in module._Args._fields_]

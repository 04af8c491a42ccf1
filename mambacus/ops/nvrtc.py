"""CUDA C++ kernels compiled at run time: NVRTC comes with torch's CUDA wheels, so no compiler need be installed.

Machine code is cached on disk, one file for each (source, macros, GPU architecture, NVRTC version).
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import importlib.util
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, overload

import torch
from torch import Tensor

from mambacus.runtime.errors import UserError

_log = logging.getLogger(__name__)
_saying = threading.Lock()  # threads that call a cached function at once all run it
_DIGEST_BYTES = 32  # SHA-256, before the machine code that it is of
_MAX_DYNAMIC_SHARED_SIZE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_PROGRAMMATIC_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
MOST_BLOCKS = 65535  # of a grid in y and z
FARTHEST_TOKEN = 2**24  # bytes from a token to the next: 128 of them are counted in 32 bits


TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as ``common.cuh`` numbers them


class CompileError(RuntimeError):
    """NVRTC or the driver refused a kernel; the message holds the log."""


@functools.cache
def unavailable() -> str | None:
    """Return why kernels cannot be compiled and launched here, or None if they can."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "torch sees no CUDA device"
    try:
        _nvrtc(), _driver()
    except OSError as error:
        return f"cannot load NVRTC or the CUDA driver: {error}"
    return None


def choose_kernels(op: str, obstacle: str | None) -> tuple[str, str]:
    """Return which GPU kernels run an op, ``cuda`` or ``triton``, and the reason.

    The CUDA kernels where they can run, which is on NVIDIA GPUs; else Triton's. ``MAMBACUS_GPU_KERNELS`` (``cuda`` or
    ``triton``) chooses.

    Args:
        op: name of the op, for messages.
        obstacle: why the CUDA kernels cannot run on the inputs, or None if they can.

    Raises:
        UserError: ``MAMBACUS_GPU_KERNELS`` is no choice, or asks for ``cuda`` against the obstacle; or Triton is needed
            and not installed.
    """
    wanted = os.environ.get("MAMBACUS_GPU_KERNELS", "")
    if wanted not in ("", "cuda", "triton"):
        raise UserError(f"MAMBACUS_GPU_KERNELS: expected cuda or triton, got {wanted!r}")
    if wanted == "cuda" and obstacle is not None:
        raise UserError(f"MAMBACUS_GPU_KERNELS=cuda: {op} cannot run on these kernels: {obstacle}")
    if wanted != "triton" and obstacle is None:
        return "cuda", "MAMBACUS_GPU_KERNELS=cuda" if wanted else "an NVIDIA GPU"
    if importlib.util.find_spec("triton") is None:
        why = "MAMBACUS_GPU_KERNELS=triton" if wanted else f"the CUDA kernels cannot run: {obstacle}"
        raise UserError(f"{op} needs the package triton ({why}): pip install 'mambacus[gpu]'")
    return "triton", "MAMBACUS_GPU_KERNELS=triton" if wanted else str(obstacle)


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    """Load the NVRTC that belongs to torch: already in the process, or beside torch in the ``nvidia`` packages."""
    major = str(torch.version.cuda).split(".")[0]
    name = f"libnvrtc.so.{major}"
    try:
        return ctypes.CDLL(name)
    except OSError:
        for folder in sys.path:
            for path in sorted(Path(folder or ".").glob(f"nvidia/*/lib/{name}")):
                return ctypes.CDLL(str(path))
        raise


@functools.cache
def source(*paths: Path) -> str:
    """Return CUDA sources one after the other, with what all share before them."""
    return "".join(path.read_text(encoding="utf-8") for path in (Path(__file__).with_name("common.cuh"), *paths))


def struct(pointers: str, longs: str, integers: str, *, floats: str = "") -> type[ctypes.Structure]:
    """Return the ctypes twin of a kernel's ``struct Args``: names separated by spaces, in the order of the fields."""
    kinds = ((pointers, ctypes.c_void_p), (longs, ctypes.c_longlong), (integers, ctypes.c_int),
             (floats, ctypes.c_float))  # fmt: skip
    fields = [(name, kind) for names, kind in kinds for name in names.split()]
    return type("Args", (ctypes.Structure,), {"_fields_": fields})


class Layout(NamedTuple):
    """What a kernel's code and arguments take from a tensor, apart from its address."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    misaligned: int  # bytes by which the address misses a multiple of 16

    @property
    def strides(self) -> tuple[int, int]:
        """The stride of the batch in elements and that of tokens in bytes."""
        return self.stride[0], self.stride[1] * self.dtype.itemsize


@overload
def layout(tensor: Tensor) -> Layout: ...


@overload
def layout(tensor: Tensor | None) -> Layout | None: ...


def layout(tensor: Tensor | None) -> Layout | None:
    """Return the layout of a tensor; None for None."""
    if tensor is None:
        return None
    return Layout(tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr() % 16)


def channels_last(tensor: Tensor) -> Tensor:
    """Return the tensor with neighbouring channels next to each other and tokens near, copied only if they are not."""
    return near(tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous())


def near(tensor: Tensor) -> Tensor:
    """Return (batch, seqlen, channels) with tokens near each other, copied only if they are not.

    Kernels count a chunk's bytes in 32 bits; a view of a large tensor may have its tokens further apart.
    """
    return tensor if tensor.stride(1) * tensor.itemsize < FARTHEST_TOKEN else tensor.contiguous()


def group_size(most: int, *layouts: Layout | None) -> int:
    """Return how many neighbouring elements of the last dimension kernels may move at once: ``most`` or 1.

    ``most`` if every group of so many begins at a multiple of 16 bytes, or of the group's size if that is less.
    """
    for tensor in layouts:
        if tensor is None:
            continue
        step = min(16, most * tensor.dtype.itemsize)
        offsets = [tensor.misaligned, *(s * tensor.dtype.itemsize for s in tensor.stride[:-1])]
        if tensor.stride[-1] != 1 or tensor.shape[-1] % most or any(offset % step for offset in offsets):
            return 1
    return most


def parameter(tensor: Tensor | None) -> Tensor | None:
    """Return a parameter as the kernels want it, float32 and contiguous."""
    return None if tensor is None else tensor.float().contiguous()


@dataclasses.dataclass(frozen=True)
class Program:
    """One source with its macros, for one device."""

    source: str
    macros: tuple[str, ...]
    device: int

    def kernel(self, name: str, shared_bytes: int = 0, *, overlaps: bool = False) -> Kernel:
        """Return a kernel ready to launch; compiles on the first call.

        Raises:
            CompileError: the compiler's log.
        """
        return _load(self, name, shared_bytes, overlaps)


@dataclasses.dataclass(frozen=True)
class Launch:
    """All of a launch but the addresses: made once for inputs of one layout, since that takes longer than a kernel.

    Attributes:
        program: the program.
        kernel: name of the kernel.
        grid: blocks.
        threads: of a block.
        struct: type of the argument.
        template: the argument without addresses.
        shared_bytes: dynamic shared memory of a block.
        overlaps: the kernel waits itself for what the kernel before it wrote, and may start when that one lets it.
    """

    program: Program
    kernel: str
    grid: tuple[int, int, int]
    threads: int
    struct: type[ctypes.Structure]
    template: bytes
    shared_bytes: int = 0
    overlaps: bool = False

    @staticmethod
    def of(
        program: Program, kernel: str, grid: tuple[int, int, int], threads: int, struct: type[ctypes.Structure],
        numbers: Mapping[str, float], shared_bytes: int = 0, *, overlaps: bool = False,
    ) -> Launch:  # fmt: skip
        """Make one; ``numbers`` are the fields that are no addresses.

        Raises:
            ValueError: a number does not fit its field, or there are too many blocks: the input is too large.
        """
        for name, kind in struct._fields_:  # type: ignore[misc]
            if kind is ctypes.c_int and not -(2**31) <= numbers.get(name, 0) < 2**31:
                raise ValueError(f"{kernel}: too large an input: expected {name} within 32 bits, got {numbers[name]}")
        if max(grid[1:]) > MOST_BLOCKS:
            raise ValueError(
                f"{kernel}: too large an input: expected at most {MOST_BLOCKS} blocks in y and z, got {grid}"
            )
        return Launch(program, kernel, grid, threads, struct, bytes(struct(**numbers)), shared_bytes, overlaps)

    def __call__(self, **tensors: Tensor | None) -> None:
        """Launch; None for tensors that the kernel will not read."""
        arguments = self.struct.from_buffer_copy(self.template)
        for name, tensor in tensors.items():
            if tensor is not None:
                setattr(arguments, name, tensor.data_ptr())
        self.program.kernel(self.kernel, self.shared_bytes, overlaps=self.overlaps)(self.grid, self.threads, arguments)


def macros(**values: float) -> tuple[str, ...]:
    """Return macros for a `Program`: truth values as 0 and 1."""
    return tuple(f"{name}={int(value)}" for name, value in values.items())


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make the device current if it is another one."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


class _Attribute(ctypes.Structure):
    """The driver's ``CUlaunchAttribute`` with a number for its value."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60))


class _Config(ctypes.Structure):
    """The driver's ``CUlaunchConfig``."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Attribute)), ("count", ctypes.c_uint),
    )  # fmt: skip


class Kernel:
    """A loaded kernel with one struct argument."""

    def __init__(self, function: ctypes.c_void_p, shared_bytes: int, device: int, overlaps: bool) -> None:
        self._function = function
        self._shared_bytes = shared_bytes
        self._device = device
        # Older GPUs start no kernel before the one before it has ended.
        self._overlaps = overlaps and torch.cuda.get_device_capability(device) >= (9, 0)

    def __call__(self, grid: tuple[int, int, int], threads: int, arguments: ctypes.Structure) -> None:
        """Launch on torch's current stream of the device."""
        _use_primary_context(self._device)
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        if self._overlaps:
            attribute = _Attribute(id=_PROGRAMMATIC_SERIALIZATION, value=1)
            config = _Config(grid, (threads, 1, 1), self._shared_bytes, stream, ctypes.pointer(attribute), 1)
            _check(_driver().cuLaunchKernelEx(ctypes.byref(config), self._function, pointers, None), "launch")
            return
        _check(
            _driver().cuLaunchKernel(
                self._function, *grid, threads, 1, 1, self._shared_bytes, ctypes.c_void_p(stream), pointers, None
            ),
            "launch",
        )


def _check(status: int, what: str) -> None:
    if status != 0:
        message = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(message))
        raise CompileError(f"CUDA {what}: {(message.value or b'').decode()} ({status})")


def _use_primary_context(device: int) -> None:
    """Make torch's context current in this thread: autograd's threads may not have it."""
    context = ctypes.c_void_p()
    _check(_driver().cuCtxGetCurrent(ctypes.byref(context)), "context")
    if not context.value:
        _check(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "context")
        _check(_driver().cuCtxSetCurrent(context), "context")


@functools.cache
def _module(program: Program) -> ctypes.c_void_p:
    code = machine_code(program)
    module = ctypes.c_void_p()
    _use_primary_context(program.device)
    _check(_driver().cuModuleLoadData(ctypes.byref(module), code), "module")
    return module


@functools.cache
def _load(program: Program, name: str, shared_bytes: int, overlaps: bool) -> Kernel:
    function = ctypes.c_void_p()
    _check(_driver().cuModuleGetFunction(ctypes.byref(function), _module(program), name.encode()), f"kernel {name}")
    if shared_bytes > 48 * 1024:
        _check(_driver().cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED_SIZE, shared_bytes), "shared memory")
    return Kernel(function, shared_bytes, program.device, overlaps)


def _cache_folder() -> Path | None:
    """Return where kernels are kept, None for a user without a home."""
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        return None
    return Path(base) / "mambacus" / "kernels"


def machine_code(program: Program) -> bytes:
    """Return the machine code of a program, from the cache if it is there.

    Raises:
        CompileError: the compiler's log.
    """
    major, minor = torch.cuda.get_device_capability(program.device)
    options = ["--std=c++17", f"--gpu-architecture=sm_{major}{minor}", *(f"-D{macro}" for macro in program.macros)]
    version = (ctypes.c_int(), ctypes.c_int())
    _nvrtc().nvrtcVersion(ctypes.byref(version[0]), ctypes.byref(version[1]))
    key = "\n".join([program.source, *options, f"{version[0].value}.{version[1].value}"])
    folder = _cache_folder()
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.cubin" if folder is not None else None
    kept = None if path is None else _kept(path)
    if kept is not None:
        return kept
    _say("compiling CUDA kernels for this GPU, once for each kind of input")
    _log.info("compiling a CUDA kernel (%s)", " ".join(program.macros))
    code = _compile(program.source, options)
    if path is None:
        _say("compiled kernels are not kept: this user has no home folder; set XDG_CACHE_HOME")
    else:
        _keep(path, code)
    return code


def _say(message: str) -> None:
    """Tell the user something, once a process."""
    with _saying:
        _print_once(message)


@functools.cache
def _print_once(message: str) -> None:
    print(f"mambacus: {message}", file=sys.stderr)


def _kept(path: Path) -> bytes | None:
    """Return kept machine code, None where there is none that is whole."""
    try:
        content = path.read_bytes()
    except OSError:  # mostly not there; where it may not be read, keeping it will fail too, and say so
        return None
    digest, code = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    return code if hashlib.sha256(code).digest() == digest else None


def _keep(path: Path, code: bytes) -> None:
    """Write machine code behind its checksum, so that no reader, process or thread sees half of it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(code).digest() + code)
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise
    except OSError as error:
        _say(f"compiled kernels are not kept in {path.parent}: {error.strerror or error}")


def _compile(source: str, options: list[str]) -> bytes:
    nvrtc = _nvrtc()
    program = ctypes.c_void_p()
    status = nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
    if status != 0:
        raise CompileError(f"NVRTC: cannot create a program ({status})")
    try:
        raw = [option.encode() for option in options]
        status = nvrtc.nvrtcCompileProgram(program, len(raw), (ctypes.c_char_p * len(raw))(*raw))
        if status != 0:
            size = ctypes.c_size_t()
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            text = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, text)
            raise CompileError(f"NVRTC ({status}): {text.value.decode(errors='replace')}")
        size = ctypes.c_size_t()
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        code = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetCUBIN(program, code)
        return code.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))

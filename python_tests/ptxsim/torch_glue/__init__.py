"""Runs whole CUDA operators without a GPU: torch glue, host launchers and kernels, from tensors to tensors.

The glue (csrc/**/cuda/glue.cpp) is compiled as it is, but registers CPU kernels in a namespace of its own; tensors it
allocates lie in the simulated device's memory, which is mapped at the addresses that the simulator gives out. A tensor
that is used by a launch after it was given back is an error, as are all that the simulator knows. The operators of
ltood_fast are then answered by it: public functions, autograd and all, on CPU tensors.
"""

import contextlib
import ctypes
import mmap
import sysconfig
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils import _pytree as pytree
from torch.utils.cpp_extension import include_paths, library_paths

from ..build import ROOT, cache_folder, cached, compile_launchers, digest, fake_runtime, run_compiler
from ..memory import GLOBAL_BASE, RED_ZONE, GlobalMemory
from ..runtime import Device, Library

HERE = Path(__file__).resolve().parent
CAPACITY = 256 << 20
_ALLOCATE = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t)
_FREE = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def _compile_glue(sources: list[Path], objects: list[Path]) -> Path:
    """The glue, our allocator and the launchers' objects as one shared library."""
    standard = "-std=c++20" if tuple(int(x) for x in torch.__version__.split(".")[:2]) >= (2, 12) else "-std=c++17"
    # HERE before csrc: its cuda/stream.h wins.
    includes = [f"-I{HERE}", f"-I{ROOT / 'csrc'}", *(f"-I{p}" for p in include_paths())]
    includes.append(f"-I{sysconfig.get_paths()['include']}")
    flags = [standard, "-O1", "-g0", "-fPIC", "-fopenmp", "-include", str(HERE / "prelude.h"), *includes]

    def compiled(source: Path) -> Path:
        name = f"{digest(source, [torch.__version__, *flags])}.o"
        return cached(name, lambda target: run_compiler(["g++", *flags, "-c", str(source), "-o", str(target)]))

    libraries = [x for path in library_paths() for x in (f"-L{path}", f"-Wl,-rpath,{path}")]
    libraries += ["-lc10", "-ltorch_cpu", "-ltorch"]
    inputs = [*map(str, map(compiled, sources)), *map(str, objects)]
    with tempfile.NamedTemporaryFile(dir=cache_folder(), suffix=".so", delete=False) as linked:
        run_compiler(["g++", "-shared", "-Wl,-Bsymbolic", *inputs, *libraries, "-o", linked.name])
    return Path(linked.name)


class _MappedMemory(GlobalMemory):
    """Device memory at the addresses that it has in the simulation, so that torch reads and writes it too."""

    def __init__(self):
        super().__init__(capacity=1)
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        fixed = 0x100000  # MAP_FIXED_NOREPLACE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | fixed
        address = libc.mmap(GLOBAL_BASE, CAPACITY, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        if address != GLOBAL_BASE:
            raise MemoryError(f"{GLOBAL_BASE:#x} is taken in this process")
        self.bytes = np.ctypeslib.as_array((ctypes.c_uint8 * CAPACITY).from_address(address))
        self.written = np.ones(CAPACITY, bool)  # torch writes unseen

    def allocate(self, size: int) -> int:
        if self._top + size + 2 * RED_ZONE > CAPACITY:
            raise MemoryError(f"the simulated device has {CAPACITY >> 20} MiB")
        return super().allocate(size)

    def rewind(self, extent: int):
        """Forgets what was allocated since `extent`; all of it must have been given back."""
        assert not self._starts or self._starts[-1] < GLOBAL_BASE + extent, "a tensor is still alive"
        self._top = extent


class TorchDevice(Device):
    """A device whose operators are called with torch tensors."""

    def __init__(self, sources: list[str], glue: list[str], arch: str = "80", defines=None, **options):
        library = Library(sources, arch, defines)
        objects = [compile_launchers(ROOT / source, arch, defines or {})[1] for source in sources] + [fake_runtime()]
        linked = _compile_glue([*(ROOT / source for source in glue), HERE / "arena.cpp"], objects)
        self._schemas = torch.library.Library("ltood_sim", "DEF")
        library.host = None
        self._linked = linked
        super().__init__(library, **options)
        self.memory = _MappedMemory()
        self._symbols = self._load_symbols()

    def define(self, *names: str):
        """Declares operators as ltood_fast has them, then loads the glue, which implements them."""
        for name in names:
            schema = str(getattr(torch.ops.ltood_fast, name).default._schema)
            self._schemas.define(schema.removeprefix("ltood_fast::"))
        self.library.host = ctypes.CDLL(str(self._linked))
        self._linked.unlink()
        self._arena_callbacks = _ALLOCATE(self._allocate), _FREE(self._free)
        host = self.library.host
        host.ptxsim_connect_arena(*self._arena_callbacks)
        host.ptxsim_connect(*self._callbacks)
        host.ptxsim_set_device(*self._description)

    def _allocate(self, size: int) -> int:
        address = self.memory.allocate(size)
        self.memory.written[address - GLOBAL_BASE :][:size] = True
        return address

    def _free(self, address: int):
        self.memory.free(address)

    @contextlib.contextmanager
    def _arena(self):
        self.library.host.ptxsim_use_arena(1)
        try:
            yield
        finally:
            self.library.host.ptxsim_use_arena(0)

    def run(self, name: str, *arguments, **options):
        """One operator on copies of its arguments in device memory; results are copied back."""

        def move(x):
            return x.detach().clone() if torch.is_tensor(x) else x

        extent = self.memory.extent
        self._failure = None
        with self._arena():
            moved, moved_options = pytree.tree_map(move, (arguments, options))
            try:
                results = getattr(torch.ops.ltood_sim, name)(*moved, **moved_options)
            except RuntimeError:
                if self._failure is not None:
                    raise self._failure from None
                raise
        copies = pytree.tree_map(move, results)
        del moved, moved_options, results
        self.memory.rewind(extent)
        return copies

    @contextlib.contextmanager
    def serving(self, *names: str):
        """While it is open, the CPU kernels of these operators of ltood_fast are the simulated CUDA ones."""
        registry = torch.library.Library("ltood_fast", "IMPL")
        try:
            for name in names:
                registry.impl(name, partial(self.run, name), "CPU", allow_override=True)
            yield self
        finally:
            registry._destroy()

"""What tests use: a Library of launchers and a Device with memory that runs them."""

import ctypes

import numpy as np

from .build import ROOT, compile_library, load_private
from .errors import SimError
from .launch import Launch
from .memory import GLOBAL_BASE, GlobalMemory
from .program import Program
from .ptx import Module
from .values import f32_to_bf16

SHARED_OPTIN = {"80": 163 * 1024, "86": 99 * 1024, "90": 227 * 1024, "90a": 227 * 1024, "100": 227 * 1024}


class Library:
    """The launchers of some .cu files, compiled. Paths are relative to the repository's root."""

    def __init__(self, sources, arch: str = "80", defines: dict[str, str] | None = None):
        paths = [ROOT / source for source in sources]
        texts, host = compile_library(paths, arch, defines or {})
        self.arch = arch
        self.modules = [Module(text) for text in texts]
        self.host = load_private(host)
        self._programs: dict[tuple, Program] = {}

    def program(self, name: str, block_dim: tuple[int, int, int]) -> Program:
        key = (name, block_dim)
        if key not in self._programs:
            module = next((module for module in self.modules if module.has(name)), None)
            if module is None:
                raise SimError(f"no kernel {name} in the PTX of this library")
            self._programs[key] = Program(module.kernel(name), block_dim)
        return self._programs[key]


class Buffer:
    """An array in device memory."""

    def __init__(self, ptr: int, shape: tuple[int, ...], dtype: np.dtype):
        self.ptr, self.shape, self.dtype = ptr, shape, dtype

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


class _LaunchRequest(ctypes.Structure):
    _fields_ = [("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_size_t)]


_ON_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(_LaunchRequest), ctypes.POINTER(ctypes.c_void_p)
)
_ON_MEMORY = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)


class Device:
    """Device memory and one stream. seed: the schedule; sm_count and blocks_per_sm: what the runtime reports."""

    def __init__(self, library: Library, seed: int = 0, sm_count: int = 4, blocks_per_sm: int = 1):
        self.library, self.seed = library, seed
        self.memory = GlobalMemory()
        self.launches: list[str] = []  # kernel names, in order
        self.instructions = 0
        self.earlier_error = 0  # that somebody else's launch has left in the runtime, before every call
        self._clock = 1
        self._failure: BaseException | None = None
        self._callbacks = (_ON_LAUNCH(self._on_launch), _ON_MEMORY(self._on_memset), _ON_MEMORY(self._on_copy))
        digits = "".join(c for c in library.arch if c.isdigit())
        self._description = (
            sm_count, int(digits[:-1]), int(digits[-1]), blocks_per_sm, SHARED_OPTIN.get(library.arch, 227 * 1024),
        )  # fmt: skip
        self._symbols = self._load_symbols()

    def _load_symbols(self) -> dict[str, int]:
        symbols = {}
        for module in self.library.modules:
            for variable in module.variables.values():
                if variable.space in ("global", "const"):
                    initial = variable.initial or bytes(variable.size)
                    symbols[variable.name] = self.put(np.frombuffer(initial, np.uint8)).ptr
        return symbols

    # Memory.

    def empty(self, shape, dtype=np.float32) -> Buffer:
        """Device memory that nobody has written: reading it is an error."""
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        dtype = np.dtype(dtype)
        size = int(np.prod(shape)) * dtype.itemsize
        return Buffer(self.memory.allocate(size), shape, dtype)

    def put(self, array) -> Buffer:
        array = np.ascontiguousarray(array)
        buffer = self.empty(array.shape, array.dtype)
        offset = buffer.ptr - GLOBAL_BASE
        self.memory.bytes[offset : offset + array.nbytes] = array.reshape(-1).view(np.uint8)
        self.memory.written[offset : offset + array.nbytes] = True
        return buffer

    def put_bf16(self, array) -> Buffer:
        """A float32 array as bfloat16, rounded to nearest even; the buffer's dtype is uint16."""
        return self.put(f32_to_bf16(np.asarray(array, np.float32)))

    def zeros(self, shape, dtype=np.float32) -> Buffer:
        return self.put(np.zeros(shape, dtype))

    def get(self, buffer: Buffer, allow_unwritten: bool = False) -> np.ndarray:
        offset = buffer.ptr - GLOBAL_BASE
        span = slice(offset, offset + buffer.nbytes)
        written = self.memory.written[span].reshape(-1, buffer.dtype.itemsize).all(1)
        if not allow_unwritten and not written.all():
            first = np.unravel_index(int(np.flatnonzero(~written)[0]), buffer.shape)
            index = tuple(int(i) for i in first)
            raise SimError(
                f"element {index} of the result was never written ({int((~written).sum())} of {written.size})"
            )
        return self.memory.bytes[span].view(buffer.dtype).reshape(buffer.shape).copy()

    # Launchers.

    def call(self, name: str, *arguments, restype=ctypes.c_int, argtypes=None):
        """Calls a launcher (extern "C") and returns what it returns, a cudaError_t.

        Buffers and None are passed as pointers, a ctypes.Structure by pointer, ctypes values as they are, float as
        float, int as a 64-bit integer (which a 32-bit parameter reads correctly); argtypes overrides."""
        host = self.library.host
        try:
            function = host[name]
        except AttributeError:
            raise SimError(f'the library has no function {name}; is it extern "C"?') from None
        function.restype, function.argtypes = restype, argtypes
        host.ptxsim_connect(*self._callbacks)
        host.ptxsim_set_device(*self._description)
        host.ptxsim_clear()
        host.ptxsim_plant_error(self.earlier_error)
        self._failure = None
        result = function(*(argument if argtypes else _as_ctypes(argument) for argument in arguments))
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        return result

    @property
    def last_error(self) -> int:
        """The value that cudaGetLastError would return."""
        return self.library.host.ptxsim_last_error()

    @property
    def complaint(self) -> str:
        """Why the fake runtime last returned an error."""
        self.library.host.ptxsim_complaint.restype = ctypes.c_char_p
        return self.library.host.ptxsim_complaint().decode()

    # Callbacks of the fake runtime. An exception must not cross the C++ frames: it is kept and raised by call().

    def _guarded(self, action) -> int:
        if self._failure is None:
            try:
                action()
                return 0
            except BaseException as error:
                self._failure = error
        return 1

    def _on_launch(self, name, request, arguments) -> int:
        request = request.contents
        return self._guarded(lambda: self._launch(name.decode(), request, arguments))

    def _launch(self, name: str, request, arguments):
        program = self.library.program(name, tuple(request.block))
        launch = Launch(
            program, self.memory, tuple(request.grid), tuple(request.block), request.shared,
            _pack_arguments(program, arguments), seed=self.seed, number=len(self.launches), clock=self._clock,
            symbols=self._symbols,
        )  # fmt: skip
        self.launches.append(name)
        self.instructions += launch.run()
        self._clock = launch.clock

    def _on_memset(self, to, _, value, size) -> int:
        def action():
            offset = self.memory.offset(to, size, "cudaMemsetAsync")
            self.memory.bytes[offset : offset + size] = value & 0xFF
            self.memory.written[offset : offset + size] = True

        return self._guarded(action) if size else 0

    def _on_copy(self, to, source, _, size) -> int:
        def action():
            target = self.memory.offset(to, size, "cudaMemcpyAsync, destination")
            origin = self.memory.offset(source, size, "cudaMemcpyAsync, source")
            for array in (self.memory.bytes, self.memory.written):
                array[target : target + size] = array[origin : origin + size].copy()

        return self._guarded(action) if size else 0


def _as_ctypes(argument):
    if isinstance(argument, Buffer):
        return ctypes.c_void_p(argument.ptr)
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, ctypes.Structure):
        return ctypes.byref(argument)
    if isinstance(argument, float | np.floating):
        return ctypes.c_float(argument)
    if isinstance(argument, int | np.integer):
        return ctypes.c_int64(int(argument))
    return argument


def _pack_arguments(program: Program, arguments) -> bytes:
    """The parameter block of a launch: each argument at the offset and with the size that the PTX declares."""
    data = bytearray(program.parameter_size)
    for index, parameter in enumerate(program.kernel.parameters):
        offset = program.parameter_offsets[parameter.name]
        data[offset : offset + parameter.size] = ctypes.string_at(arguments[index], parameter.size)
    return bytes(data)

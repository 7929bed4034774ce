"""Turns operand text into functions: readers give one value for every thread of the block, writers store one.

A register array is never changed in place, so a reader may hand out the array itself."""

import re
import struct
from collections.abc import Callable

import numpy as np

from .errors import SimError
from .ptx import Kernel, elements
from .values import CODECS, REGISTER_DTYPES

WARP = 32
_INTEGER = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|\d+)U?$")
_ADDRESS = re.compile(r"\[\s*([^\]+]+?)\s*(?:\+\s*(-?\d+))?\s*\]$")

Reader = Callable  # (block) -> array [threads]
Writer = Callable  # (block, mask | None, values) -> None


class Operands:
    """Compiles operands of one kernel for one block shape."""

    def __init__(self, kernel: Kernel, block_dim: tuple[int, int, int]):
        self.kernel = kernel
        self.threads = block_dim[0] * block_dim[1] * block_dim[2]
        self.lanes = -(-self.threads // WARP) * WARP
        self.slots: dict[str, int] = {}
        self.slot_dtypes: list[np.dtype] = []
        self.where, self.site = "?", 0  # location and index of the instruction being compiled
        thread = np.arange(self.lanes, dtype=np.uint32)
        x, y, z = (np.uint32(size) for size in block_dim)
        self._fixed = {
            "%tid.x": thread % x, "%tid.y": thread // x % y, "%tid.z": thread // (x * y),
            "%ntid.x": x, "%ntid.y": y, "%ntid.z": z,
            "%laneid": thread % WARP, "%warpid": thread // WARP, "%nwarpid": np.uint32(self.lanes // WARP),
            "WARP_SZ": np.uint32(WARP), "%clock": np.uint32(0), "%clock64": np.uint32(0), "%smid": np.uint32(0),
            "%globaltimer": np.uint32(0), "%cluster_ctarank": np.uint32(0), "%cluster_nctarank": np.uint32(1),
        }  # fmt: skip
        self._fixed["%lanemask_eq"] = np.uint32(1) << thread % WARP
        self._fixed["%lanemask_lt"] = self._fixed["%lanemask_eq"] - np.uint32(1)
        below_or_equal = self._fixed["%lanemask_eq"] | self._fixed["%lanemask_lt"]
        self._fixed |= {"%lanemask_le": below_or_equal, "%lanemask_gt": ~below_or_equal}
        self._fixed["%lanemask_ge"] = ~self._fixed["%lanemask_lt"]

    def slot(self, name: str) -> int:
        if name not in self.slots:
            type_name = self.kernel.register_type(name)
            if type_name is None:
                raise SimError(f"{self.where}: {name} is no register of this kernel")
            self.slots[name] = len(self.slot_dtypes)
            self.slot_dtypes.append(REGISTER_DTYPES[type_name])
        return self.slots[name]

    def is_register(self, name: str) -> bool:
        return self.kernel.register_type(name) is not None

    def is_parameter(self, name: str) -> bool:
        return any(parameter.name == name for parameter in self.kernel.parameters)

    def _everywhere(self, value, dtype: np.dtype) -> np.ndarray:
        array = np.empty(self.lanes, dtype)
        array[:] = value
        array.flags.writeable = False
        return array

    def bits(self, name: str, dtype) -> Reader:
        """Reads an operand as raw bits of a dtype."""
        dtype = np.dtype(dtype)
        if name.startswith("!"):
            inner = self.bits(name[1:].strip(), dtype)
            return lambda block: ~inner(block)
        if name in self._fixed:
            value = self._everywhere(self._fixed[name].astype(dtype), dtype)
            return lambda block: value
        if name.startswith(("%ctaid.", "%nctaid.")):
            register, axis = name.split(".")
            which, index = ("block_index" if register == "%ctaid" else "grid_dim"), "xyz".index(axis)
            return lambda block: self._everywhere(getattr(block, which)[index], dtype)
        if self.is_register(name):
            return self._register(name, dtype)
        if _INTEGER.match(name):
            text, width = name.rstrip("U"), 8 * dtype.itemsize
            is_octal = re.match(r"-?0[0-7]+$", text)
            number = int(text, 8 if is_octal else 0) % (1 << width)
            raw = np.array([number], f"u{dtype.itemsize}") if dtype.kind != "b" else np.array([number != 0])
            value = self._everywhere(raw.view(dtype)[0], dtype)
            return lambda block: value
        if re.match(r"0[fFdD][0-9a-fA-F]+$", name):
            return self._float_literal(name, dtype)
        return self._symbol(name, dtype)

    def _register(self, name: str, dtype: np.dtype) -> Reader:
        slot = self.slot(name)
        held = self.slot_dtypes[slot]
        if held == dtype:
            return lambda block: block.registers[slot]
        if held.itemsize == dtype.itemsize and bool not in (held, dtype):
            return lambda block: block.registers[slot].view(dtype)
        if held.itemsize > dtype.itemsize:  # st.b8 of a 16-bit register: the low bits
            unsigned = np.dtype(f"u{held.itemsize}")
            return lambda block: block.registers[slot].view(unsigned).astype(f"u{dtype.itemsize}").view(dtype)
        return lambda block: block.registers[slot].astype(dtype)

    def _float_literal(self, name: str, dtype: np.dtype) -> Reader:
        raw = bytes.fromhex(name[2:])
        value = struct.unpack(">f" if len(raw) == 4 else ">d", raw)[0]
        literal = np.array([value], np.float32 if len(raw) == 4 else np.float64)
        if len(raw) == dtype.itemsize:
            value = self._everywhere(literal.view(dtype)[0], dtype)
        else:
            value = self._everywhere(literal.astype(dtype)[0], dtype)
        return lambda block: value

    def _symbol(self, name: str, dtype: np.dtype) -> Reader:
        base, _, offset = name.partition("+")
        base, extra = base.strip(), int(offset or 0)
        self.symbol_exists(base)
        return lambda block: self._everywhere(dtype.type(block.symbol(base) + extra), dtype)

    def symbol_exists(self, name: str):
        kernel = self.kernel
        known = (kernel.variables, kernel.module.variables, {p.name for p in kernel.parameters})
        if not any(name in names for names in known):
            raise SimError(f"{self.where}: operand not understood: {name}")

    def read(self, name: str, type_name: str) -> Reader:
        """Reads an operand as numbers of a PTX type."""
        codec = CODECS[type_name]
        raw = self.bits(name, codec.bits)
        if codec.decode is None:
            return raw
        decode = codec.decode
        return lambda block: decode(raw(block))

    def write_bits(self, name: str) -> Writer:
        """Writes bits: an array of any dtype with the register's width, or wider integers that are cut."""
        if name == "_":
            return lambda block, mask, values: None
        slot = self.slot(name)
        dtype = self.slot_dtypes[slot]

        def write(block, mask, values):
            if values.dtype != dtype:
                if values.dtype.itemsize == dtype.itemsize:
                    values = values.view(dtype)
                else:
                    values = values.astype(dtype)
            block.registers[slot] = values if mask is None else np.where(mask, values, block.registers[slot])

        return write

    def write(self, name: str, type_name: str) -> Writer:
        codec = CODECS[type_name]
        store = self.write_bits(name)
        if codec.encode is None:
            return store
        encode = codec.encode
        return lambda block, mask, values: store(block, mask, encode(values))

    def vector(self, operand: str) -> list[str]:
        return elements(operand)

    def address(self, operand: str) -> Reader:
        """Reads [register + offset] or [symbol + offset] as int64 addresses."""
        match = _ADDRESS.match(operand)
        if not match:
            raise SimError(f"{self.where}: address not understood: {operand}")
        base, offset = match[1], int(match[2] or 0)
        if not self.is_register(base):
            if _INTEGER.match(base):
                value = self._everywhere(int(base, 0) + offset, np.dtype(np.int64))
                return lambda block: value
            self.symbol_exists(base)
            return lambda block: self._everywhere(block.symbol(base) + offset, np.dtype(np.int64))
        slot = self.slot(base)
        if self.slot_dtypes[slot].itemsize == 8:
            if offset:
                return lambda block: block.registers[slot].view(np.int64) + offset
            return lambda block: block.registers[slot].view(np.int64)
        return lambda block: block.registers[slot].view(np.uint32).astype(np.int64) + offset

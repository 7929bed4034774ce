"""TMA loads of tensor tiles (cp.async.bulk.tensor), which land late and in any order.

The tensor map is the one that the fake cuTensorMapEncodeTiled writes (fake_cudart.cpp). Until a tile has landed its
destination counts as never written."""

import struct
from dataclasses import dataclass

import numpy as np

from ..errors import SimError
from ..memory import GLOBAL_BASE, PARAM_WINDOW
from ..ptx import split_operands
from .mbarrier import barrier_at
from .registry import implements, unsupported

_MAP = struct.Struct("<IHBB Q 5Q 4Q 5I")
_MAGIC = 0x53585450


def swizzle(addresses: np.ndarray, bits: int) -> np.ndarray:
    """Mixes `bits` bits from bit 4 on with those from bit 7 on, on absolute shared addresses."""
    return addresses ^ ((addresses >> 7 & ((1 << bits) - 1)) << 4)


@dataclass(frozen=True)
class TensorMap:
    rank: int
    element: int  # bytes
    swizzle: int  # CU_TENSOR_MAP_SWIZZLE_NONE 0, 32B 1, 64B 2, 128B 3: so many address bits are mixed
    address: int
    sizes: tuple[int, ...]  # innermost first
    strides: tuple[int, ...]  # bytes, of the dimensions behind the innermost
    box: tuple[int, ...]

    @classmethod
    def parse(cls, data: bytes, where: str) -> "TensorMap":
        magic, rank, element, mode, address, *rest = _MAP.unpack(data[: _MAP.size])
        if magic != _MAGIC:
            raise SimError(f"{where}: the tensor map was not made by cuTensorMapEncodeTiled")
        sizes, strides, box = rest[:5], rest[5:9], rest[9:]
        return cls(rank, element, mode, address, tuple(sizes[:rank]), tuple(strides[: rank - 1]), tuple(box[:rank]))

    @property
    def bytes(self) -> int:
        return int(np.prod(self.box)) * self.element

    def source(self, corner: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Addresses of the elements of the box at a corner, outermost dimension slowest, and which exist."""
        index = np.meshgrid(*(np.arange(size) for size in reversed(self.box)), indexing="ij")
        addresses, inside = np.int64(self.address), np.bool_(True)
        for axis, at in enumerate(reversed(index)):
            position = at.ravel() + corner[axis]
            inside = inside & (position >= 0) & (position < self.sizes[axis])
            addresses = addresses + position * (self.element if axis == 0 else self.strides[axis - 1])
        return addresses, inside


@dataclass
class BulkCopy:
    offsets: np.ndarray  # of each byte in shared memory
    data: np.ndarray
    barrier: int
    knowledge: np.ndarray
    where: str

    def land(self, block):
        memory = block.shared_space.memory
        memory.bytes[self.offsets] = self.data
        memory.written[self.offsets] = True
        barrier = barrier_at(block, self.barrier, self.where)
        barrier.transactions -= len(self.data)
        barrier.arrive(block, self.where, 0, self.knowledge)
        block.progress += 1


@implements("cp.async.bulk.tensor")
def compile_tensor_load(instruction, operands):
    parts = instruction.parts
    if (
        parts[5:7] != ["shared_cluster", "global"]
        or "mbarrier_complete_tx_bytes" not in parts
        or len(instruction.operands) > 3
    ):
        raise unsupported(instruction)
    destination, barrier = operands.address(instruction.operands[0]), operands.address(instruction.operands[2])
    map_name, corner_names = split_operands(instruction.operands[1].strip("[] "))
    map_address = operands.bits(map_name, np.uint64)
    corner = [operands.bits(name, np.int32) for name in operands.vector(corner_names)]
    site = operands.site

    def run(block, mask):
        threads = block.every_thread if mask is None else np.flatnonzero(mask)
        for thread in threads.tolist():
            tensor = _tensor_map(block, int(map_address(block)[thread]), instruction.where)
            at, target = int(destination(block)[thread]), int(barrier(block)[thread])
            place = [int(read(block)[thread]) for read in corner]
            _issue(block, thread, tensor, at, target, place, site)

    return run


def _tensor_map(block, address: int, where: str) -> TensorMap:
    offset = address - PARAM_WINDOW if address >= PARAM_WINDOW else address
    data = block.param_space.bytes[offset : offset + 128].tobytes()
    if len(data) < 128 or offset % 64:
        raise SimError(f"{where}: the tensor map must be a __grid_constant__ parameter, aligned to 64 bytes")
    return TensorMap.parse(data, where)


def _issue(block, thread: int, tensor: TensorMap, at: int, target: int, corner: list[int], site: int):
    where, space = block.program.where[site], block.shared_space
    align = 128 << tensor.swizzle if tensor.swizzle else 128  # the pattern of 128B repeats every 1024 bytes
    if at % align:
        raise SimError(f"{where}: destination {at:#x} of a tile must be aligned to {align} bytes")
    space.memory.check(np.array([at]), tensor.bytes, where)
    addresses, inside = tensor.source(corner)
    data = np.zeros((len(addresses), tensor.element), np.uint8)
    if inside.any():
        data[inside] = _fetch(block, thread, addresses[inside], tensor.element, site)
    linear = at + np.arange(tensor.bytes)
    offsets = swizzle(linear, tensor.swizzle)
    words = np.unique(offsets // space.shadow.granule)
    space.note_engine_write(thread, words, site)
    space.memory.bytes[offsets] = 0xFF
    space.memory.written[offsets] = False
    block.bulk_copies.append(BulkCopy(offsets, data.ravel(), target, block.clocks.engine_knowledge(thread), where))


def _fetch(block, thread: int, addresses: np.ndarray, element: int, site: int) -> np.ndarray:
    device = block.device_space
    threads = np.full(len(addresses), thread)
    device.memory.check(addresses, element, block.program.where[site])
    offsets = addresses - GLOBAL_BASE
    device.require_written(threads, offsets, element, 1, site)
    device.note_read(threads, offsets, element, site)
    return device.memory.bytes[offsets[:, None] + np.arange(element)]

"""Runs the threads of one block.

All warps at the same instruction run it together, on arrays over the threads of the block; a gang is a set of warps
scheduled that way, a group is the part of a gang at one instruction. Inside a gang the group with the lowest address
runs first, which brings diverged lanes together again where structured code joins. At every barrier the seed decides
whether the warps go on together or in smaller gangs, one after the other."""

from dataclasses import dataclass, field

import numpy as np

from .errors import SimError
from .fences import BlockOrder
from .instructions.async_copy import PendingCopies
from .instructions.bulk_copy import BulkCopy
from .instructions.mbarrier import MBarrier
from .instructions.wgmma import Warpgroup
from .masks import every, some
from .memory import SharedMemory
from .program import BARRIER, BRANCH, EXIT, GATHERED, PLAIN, SWITCH
from .race import Clocks, Shadow
from .spaces import GenericSpace, GlobalSpace, LocalSpace, ParamSpace, SharedSpace

WARP = 32
SLICE = 20_000  # steps a gang may run before others get their turn (a thread may poll what another one writes)
END = 1 << 30
LANDING_CHANCE = 0.2  # how often a bulk copy lands although somebody could go on
SPLIT_CHANCE = 0.25  # how often a barrier lets warps go on apart


@dataclass
class Group:
    pc: int
    mask: np.ndarray
    stuck: bool = False  # waits for other lanes of its warps


@dataclass
class Barrier:
    arrived: np.ndarray
    expected: int | None
    waiting: list[Group] = field(default_factory=list)


class Block:
    def __init__(self, launch, number: int):
        """launch: the launch.Launch it belongs to; number: linear index in the grid."""
        self.launch, self.number, self.program = launch, number, launch.program
        self.grid_dim, self.block_dim = launch.grid_dim, launch.block_dim
        x, y, _ = self.grid_dim
        self.block_index = (number % x, number // x % y, number // (x * y))
        operands = self.program.operands
        self.lanes, self.warps = operands.lanes, operands.lanes // WARP
        self.every_thread = np.arange(self.lanes)
        self.rng = np.random.default_rng([launch.seed, launch.number, number])
        self.present = self.every_thread < operands.threads
        self.live = self.present
        self.registers = [_poison(self.lanes, dtype) for dtype in operands.slot_dtypes]
        self.clocks = Clocks(self.lanes, launch.clock)
        self.order = BlockOrder(self.clocks, number + 1, launch.published)
        self.copies = PendingCopies(self.lanes)
        self._open_spaces(launch)
        self.barriers: dict[int, Barrier] = {}
        self.ready: list[list[Group]] = []
        self.spinning: np.ndarray | None = None  # set by an instruction that polls in vain
        self.mbarriers: dict[int, MBarrier] = {}  # by shared address
        self.bulk_copies: list[BulkCopy] = []  # in flight
        self.warpgroups = [Warpgroup() for _ in range(self.warps)]
        self.progress = 0  # steps when something that warps poll for has changed
        self._idle: set[int] = set()  # warps that have polled in vain since
        self._polled: dict[int, tuple[int, int]] = {}  # warp -> (instruction, progress) of its last vain poll
        self.executed = 0

    def _open_spaces(self, launch):
        kernel = self.program.kernel
        known = {**kernel.module.variables, **kernel.variables}
        shared = SharedMemory([v for v in known.values() if v.space == "shared"], launch.dynamic_shared)
        shadow = Shadow(shared.size, self.program.granules["shared"], self.warps)
        self.shared_space = SharedSpace(self, shared, shadow)
        self.device_space = GlobalSpace(self, launch.memory, launch.shadow)
        self.local_space = LocalSpace(self, self.program.local_size, self.lanes)
        self.param_space = ParamSpace(self, launch.arguments)
        self.generic_space = GenericSpace(self.shared_space, self.local_space, self.param_space, self.device_space)
        launch.shadow.block = self.number + 1

    # What instructions use.

    def symbol(self, name: str) -> int:
        """Address of a variable in its own state space."""
        for table in (self.shared_space.memory.symbols, self.program.local_symbols, self.program.parameter_offsets):
            if name in table:
                return table[name]
        return self.launch.symbols[name]

    def describe(self, thread: int) -> str:
        if thread >= self.lanes:
            return f"the copy engine of block {self.block_index}"
        x, y, _ = self.block_dim
        where = thread if self.block_dim[1:] == (1, 1) else (thread % x, thread // x % y, thread // (x * y))
        block = self.block_index[0] if self.grid_dim[1:] == (1, 1) else self.block_index
        return f"thread {where} of block {block}"

    def failure(self, where: str, threads: np.ndarray, what: str) -> SimError:
        """threads: a mask over the block or thread numbers; the first one is named."""
        first = np.flatnonzero(threads)[0] if threads.dtype == bool else threads[0]
        return SimError(f"{where}: {self.describe(int(first))} {what}")

    def warps_of(self, mask) -> np.ndarray:
        """Warps that take part in a collective (whose lanes are all there, or all that are left)."""
        return np.arange(self.warps) if mask is None else np.flatnonzero(mask.reshape(-1, WARP).any(1))

    def from_warps(self, values: np.ndarray, warps: np.ndarray) -> np.ndarray:
        """Values [len(warps), 32] as an array over the block."""
        if len(warps) == self.warps:
            return np.ascontiguousarray(values).reshape(-1)
        full = np.zeros((self.warps, WARP), values.dtype)
        full[warps] = values
        return full.reshape(-1)

    def random_order(self, count: int) -> np.ndarray:
        return self.rng.permutation(count)

    def atomic_targets(self, space: str, threads, addresses, width: int, site: int):
        """(threads, bytes, offsets) of the memories an atomic goes to, checked and recorded."""
        if space == "generic_space":
            parts = list(self.generic_space.split(addresses))
        else:
            parts = [(np.arange(len(threads)), getattr(self, space), addresses)]
        for index, target, local in parts:
            offsets = target.locate(threads[index], local, width, site)
            target.require_written(threads[index], offsets, width, 1, site)
            target.note_write(threads[index], offsets, width, site, atomic=True)
            if target is self.device_space:
                self.order.atomic(threads[index], local)
            yield threads[index], target.memory.bytes, offsets

    def fence(self, mask):
        """__threadfence."""
        self.order.fence(self.every_thread if mask is None else np.flatnonzero(mask))

    # Scheduling.

    def run(self):
        self._release(self.live.copy(), 0)
        while self.ready:
            gang = self.ready.pop(int(self.rng.integers(len(self.ready))))
            self._run_gang(gang)
            self._land_bulk_copies()
            if self.executed > self.launch.step_limit:
                raise SimError(f"{self.program.kernel.name}: block {self.block_index} does not finish")
        if self.barriers:
            raise SimError(f"deadlock: {self._waiting()}, the other threads of the block have exited")
        self.launch.clock = self.clocks.now + 1

    def _land_bulk_copies(self):
        """Now and then one lands; one lands for sure, if there is any, when every warp polls in vain."""
        stalled = bool(self.ready) and all(
            warp in self._idle for gang in self.ready for g in gang for warp in self.warps_of(g.mask).tolist()
        )
        if self.bulk_copies and (stalled or self.rng.random() < LANDING_CHANCE):
            self.bulk_copies.pop(int(self.rng.integers(len(self.bulk_copies)))).land(self)
            self._idle.clear()
        elif stalled:
            polls = [
                f"warps {self.warps_of(g.mask).tolist()} poll at {self._where_polled(g)}" for (g, *_) in self.ready
            ]
            raise SimError(f"deadlock: {'; '.join(polls + ([self._waiting()] if self.barriers else []))}")

    def _where_polled(self, group: Group) -> str:
        return self.program.where[group.pc - 1]

    def _waiting(self) -> str:
        texts = []
        for number, barrier in self.barriers.items():
            for group in barrier.waiting:
                warps = np.flatnonzero(group.mask.reshape(-1, WARP).any(1)).tolist()
                texts.append(f"warps {warps} wait at barrier {number}, {self.program.where[group.pc - 1]}")
        return "; ".join(texts)

    def _release(self, mask: np.ndarray, pc: int):
        """Lets the threads of mask go on at pc, together or in random gangs."""
        warps = np.flatnonzero(mask.reshape(-1, WARP).any(1))
        if len(warps) > 1 and self.rng.random() < SPLIT_CHANCE:
            order = self.rng.permutation(warps)
            cut = int(self.rng.integers(1, len(warps)))
            for part in (order[:cut], order[cut:]):
                self.ready.append([Group(pc, mask & self._lanes_of(part))])
        else:
            self.ready.append([Group(pc, mask)])

    def _lanes_of(self, warps: np.ndarray) -> np.ndarray:
        lanes = np.zeros((self.warps, WARP), bool)
        lanes[warps] = True
        return lanes.ravel()

    def _run_gang(self, gang: list[Group]):
        self.budget = self.executed + SLICE
        while gang:
            group = self._lowest(gang)
            self._advance(group, gang)
            if self.executed > self.budget and gang:
                self._scatter(gang)
                return

    def _scatter(self, gang: list[Group]):
        """Gives every warp of a gang its own turn."""
        for warp in range(self.warps):
            lanes = self._lanes_of(np.array([warp]))
            parts = [Group(g.pc, g.mask & lanes, g.stuck) for g in gang if some(g.mask & lanes)]
            if parts:
                self.ready.append(parts)

    def _lowest(self, gang: list[Group]) -> Group:
        """Takes the group with the lowest address that can run, merged with those at the same address."""
        if len(gang) == 1 and not gang[0].stuck:
            return gang.pop()
        runnable = [group for group in gang if not group.stuck]
        if not runnable:
            self._fail_diverged(gang)
        pc = min(group.pc for group in runnable)
        lowest = Group(pc, np.zeros(self.lanes, bool))
        for group in gang:
            if group.pc == pc:
                lowest.mask = lowest.mask | group.mask
        gang[:] = [group for group in gang if group.pc != pc]
        return lowest

    def _fail_diverged(self, gang: list[Group]):
        group = gang[0]
        where = self.program.where[group.pc]
        warp = int(np.flatnonzero(group.mask)[0]) // WARP
        lanes = group.mask.reshape(-1, WARP)[warp]
        others = [
            f"{np.flatnonzero(g.mask.reshape(-1, WARP)[warp]).tolist()} at {self.program.where[g.pc]}"
            for g in gang[1:]
            if g.mask.reshape(-1, WARP)[warp].any()
        ]
        here = np.flatnonzero(lanes).tolist()
        elsewhere = "lanes " + "; ".join(others) if others else "the others have finished"
        raise SimError(f"{where}: diverged warp {warp} of block {self.number}: lanes {here} are here, {elsewhere}")

    def _advance(self, group: Group, gang: list[Group]):
        """Runs a group until it ends, splits, waits or meets another group of its gang."""
        pc, mask = group.pc, group.mask
        active = None if every(mask) else mask
        stop = min((other.pc for other in gang if other.pc > pc), default=END)
        steps, registers = self.program.steps, self.registers
        while pc < stop:
            kind, run, predicate, negated, target = steps[pc]
            self.executed += 1
            chosen = active
            if predicate is not None:
                chosen = ~registers[predicate] if negated else registers[predicate]
                if active is not None:
                    chosen = chosen & active
                if every(chosen):
                    chosen = None
                elif not some(chosen):
                    pc += 1
                    continue
            if kind == PLAIN:
                run(self, chosen)
                pc += 1
                if self.spinning is not None:
                    return self._yield(Group(pc, mask), gang)
            elif kind == GATHERED:
                if chosen is None:
                    run(self, None)
                    pc += 1
                else:
                    here = self._gather(chosen, mask, pc, getattr(run, "members", None), gang)
                    if here is None:
                        return None
                    if here is not mask:
                        run(self, here)
                        gang.append(Group(pc + 1, here))
                        return None
                    run(self, chosen)
                    pc += 1
            elif kind == BRANCH:
                if chosen is None or chosen is active or every(mask == chosen):
                    pc = target
                    if gang or self.executed > self.budget:
                        break
                else:
                    gang += [Group(target, chosen), Group(pc + 1, mask & ~chosen)]
                    return None
            else:
                return self._control(kind, run, target, Group(pc, mask), chosen, gang)
        gang.append(Group(pc, mask))
        return None

    def _gather(self, chosen, mask, pc: int, members, gang) -> np.ndarray | None:
        """The lanes that may run a collective now: those whose warps have everybody who is needed. The rest waits.

        Needed are the live lanes that the member mask names; without one (bar.sync, mma, ldmatrix: .aligned) every lane
        of the warp, finished or not. Returns mask itself when the whole group runs on, None when nobody can."""
        if _whole_warps(chosen):  # the common case
            lacking = np.zeros(self.warps, bool)
        else:
            warps = chosen.reshape(-1, WARP).any(1)
            needed = self.present & np.repeat(warps, WARP) if members is None else members(self, chosen) & self.live
            lacking = (needed & ~chosen).reshape(-1, WARP).any(1)
        if not some(lacking) and (chosen is mask or every(chosen == mask)):
            return mask
        stuck = chosen & np.repeat(lacking, WARP)
        passing = mask & ~chosen
        here = chosen & ~stuck
        if some(stuck):
            gang.append(Group(pc, stuck, stuck=True))
        if some(passing):
            gang.append(Group(pc + 1, passing))
        return here if some(here) else None

    def _control(self, kind, run, target, group: Group, chosen, gang):
        pc, mask = group.pc, group.mask
        chosen = mask if chosen is None else chosen & mask
        if kind == EXIT:
            self.live = self.live & ~chosen
            for other in gang:
                other.stuck = False  # whom it waits for may be gone
            if some(rest := mask & ~chosen):
                gang.append(Group(pc + 1, rest))
            self._check_barriers()
        elif kind == BARRIER:
            here = self._gather(chosen, mask, pc, None, gang)
            if here is not None:
                self._arrive(run, target, Group(pc, here), gang)
        elif kind == SWITCH:
            index = np.minimum(run(self), len(target) - 1)
            for value in np.unique(index[mask]):
                gang.append(Group(target[value], mask & (index == value)))
        else:
            raise self.failure(self.program.where[pc], chosen, "ran into a trap (a failed assertion?)")

    def _arrive(self, reads, waits: bool, group: Group, gang):
        """Threads that name different barriers arrive at each; those of one warp must name the same."""
        numbers = reads[0](self)
        first = np.repeat(numbers.reshape(-1, WARP)[np.arange(self.lanes // WARP), _first_lane(group.mask)], WARP)
        if (numbers != first)[group.mask].any():
            raise SimError(f"{self.program.where[group.pc]}: threads of a warp name different barriers")
        for number in np.unique(numbers[group.mask]).tolist():
            self._arrive_at(number, reads[1:], waits, Group(group.pc, group.mask & (numbers == number)), gang)
        self._check_barriers()

    def _arrive_at(self, number: int, reads, waits: bool, group: Group, gang):
        counts = {int(value) for read in reads for value in read(self)[group.mask]}
        if len(counts) > 1:
            raise SimError(f"{self.program.where[group.pc]}: barrier {number} is used with two thread counts")
        expected = counts.pop() if counts else None
        barrier = self.barriers.setdefault(number, Barrier(np.zeros(self.lanes, bool), expected))
        if barrier.expected != expected:
            raise SimError(f"{self.program.where[group.pc]}: barrier {number} is used with two thread counts")
        barrier.arrived |= group.mask
        group.pc += 1
        if waits:
            barrier.waiting.append(group)
        else:
            gang.append(group)

    def _check_barriers(self):
        for number, barrier in list(self.barriers.items()):
            expected = int(self.live.sum()) if barrier.expected is None else barrier.expected
            whole_warps = np.repeat(barrier.arrived.reshape(-1, WARP).any(1), WARP)
            count = int(barrier.arrived.sum() if barrier.expected is None else whole_warps.sum())
            if count < expected:
                continue
            sites = {group.pc for group in barrier.waiting}
            if barrier.expected is None and len(sites) > 1:
                raise SimError(f"divergent barrier: {self._waiting()}")
            del self.barriers[number]
            exited = ~self.live if barrier.expected is None else np.zeros_like(self.live)
            waiting = np.logical_or.reduce([group.mask for group in barrier.waiting])
            self.clocks.barrier(barrier.arrived | exited, waiting | exited)
            for pc in sorted(sites):
                self._release(np.logical_or.reduce([g.mask for g in barrier.waiting if g.pc == pc]), pc)

    def _yield(self, group: Group, gang: list[Group]):
        """Warps that poll in vain go to the back of the queue."""
        warps = np.repeat(group.mask.reshape(-1, WARP).any(1), WARP)
        apart = [group] + [Group(g.pc, g.mask & warps, g.stuck) for g in gang if some(g.mask & warps)]
        gang[:] = [Group(g.pc, g.mask & ~warps, g.stuck) for g in gang if some(g.mask & ~warps)]
        self.spinning = None
        self.ready.append(apart)
        now = (group.pc, self.progress)
        for warp in self.warps_of(group.mask).tolist():
            if self._polled.get(warp) == now:
                self._idle.add(warp)
            else:
                self._idle.clear()
            self._polled[warp] = now


def _first_lane(mask: np.ndarray) -> np.ndarray:
    """Of every warp, the lowest lane in the mask; 0 where there is none."""
    return mask.reshape(-1, WARP).argmax(1)


def _whole_warps(mask: np.ndarray) -> bool:
    """Is every warp in the mask with all its lanes, or not at all?"""
    words = mask.view(np.uint64).reshape(-1, WARP // 8)
    return every((words == words[:, :1]) & ((words == 0) | (words == 0x0101010101010101)))


def _poison(lanes: int, dtype: np.dtype) -> np.ndarray:
    """What a register holds before anything was written to it."""
    if dtype.kind == "b":
        return np.zeros(lanes, bool)
    return np.full(lanes * dtype.itemsize, 0xCD, np.uint8).view(dtype)

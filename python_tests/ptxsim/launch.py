"""One kernel launch: blocks run one after the other, in an order drawn from the seed.

Blocks are never co-resident here: a block that waits for another one deadlocks. Races between blocks are found anyway,
because nothing orders two blocks of a launch but atomics with fences."""

import numpy as np

from .block import Block
from .errors import SimError
from .program import Program
from .race import GridShadow

STEP_LIMIT = 20_000_000  # instructions a block may execute


class Launch:
    def __init__(self, program: Program, memory, grid_dim, block_dim, dynamic_shared: int, arguments: bytes, **options):
        """options: seed, number (of the launch on its device), clock (time so far), symbols (of the module)."""
        self.program, self.memory = program, memory
        self.grid_dim, self.block_dim, self.dynamic_shared = grid_dim, block_dim, dynamic_shared
        self.arguments = np.frombuffer(arguments, np.uint8)
        self.seed, self.number = options["seed"], options["number"]
        self.clock, self.symbols = options["clock"], options["symbols"]
        self.step_limit = STEP_LIMIT
        if any(size < 1 for size in (*grid_dim, *block_dim)):
            raise SimError(f"{program.kernel.name}: launch of grid {grid_dim} with blocks {block_dim}")
        threads = int(np.prod(block_dim))
        if threads > program.kernel.threads_limit:
            raise SimError(
                f"{program.kernel.name}: {threads} threads a block, its limit is {program.kernel.threads_limit}"
            )
        self.blocks = int(np.prod(grid_dim))
        self.published: dict = {}  # see fences.BlockOrder
        warps = program.operands.lanes // 32
        self.shadow = GridShadow(memory.extent, program.granules["global"], warps)

    def run(self) -> int:
        """Executes all blocks; the number of instructions (of warps together) it took."""
        executed = 0
        with np.errstate(all="ignore"):
            for number in np.random.default_rng([self.seed, self.number]).permutation(self.blocks):
                block = Block(self, int(number))
                block.run()
                executed += block.executed
        return executed

"""The one exception of the simulator. Its message says where (source line, instruction, thread) and what went wrong."""


class SimError(Exception):
    """A kernel, a launcher or a test did something that a GPU would not do correctly."""

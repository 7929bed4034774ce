import pytest

from python_tests.distributed.ranks import Ranks


@pytest.fixture(scope="session")
def groups():
    """The processes of each world size that a test asks for: ``groups(3)``."""
    started = {}

    def of(world: int) -> Ranks:
        if world not in started:
            started[world] = Ranks(world)
        return started[world]

    yield of
    for ranks in started.values():
        ranks.close()

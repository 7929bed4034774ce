"""DDP with group=: two processes train on one batch, and end where one process with the whole batch ends.

    python examples/ddp_group.py

With torchrun, the process group is there already and `group=dist.group.WORLD` is all that a loss needs.
"""

import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

import ltood_fast

RANKS, STEPS, IMAGES = 2, 5, 64


def make_network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16))


def train(network: torch.nn.Module, images: torch.Tensor, group: dist.ProcessGroup | None) -> float:
    """`images` are this rank's; the loss is that of the images of all ranks."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    for step in range(STEPS):
        noise = 0.1 * (step + 1)
        z = network(torch.cat([images, images * (1 + noise)]))  # two views of each image of this rank
        loss = ltood_fast.nt_xent(z, 0.2, group=group)
        optimizer.zero_grad()
        loss.backward()  # DDP averages the gradients; group= makes the average that of the whole batch
        optimizer.step()
    return loss.item()


def worker(rank: int, store: str, images: torch.Tensor) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=RANKS)
    network = DistributedDataParallel(make_network())
    loss = train(network, images.chunk(RANKS)[rank], dist.group.WORLD)
    if rank == 0:
        print(f"two processes: loss {loss:.5f}, weights {network.module[0].weight.sum().item():.5f}")
    dist.destroy_process_group()


def main() -> None:
    images = torch.randn(IMAGES, 32, generator=torch.Generator().manual_seed(1))
    network = make_network()
    loss = train(network, images, None)
    print(f"one process:   loss {loss:.5f}, weights {network[0].weight.sum().item():.5f}")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (f"{folder}/store", images), nprocs=RANKS)


if __name__ == "__main__":
    main()

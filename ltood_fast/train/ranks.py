"""The processes of one run: who they are by torchrun's environment, and what they do when one of them fails.

All ranks go through the same epochs in the same order and draw the same random numbers; rank 0 alone writes files.

What a run costs a rank, in bytes, float32. W ranks; of one: N views of H numbers; P parameters, C channels of BatchNorm
in L layers; embeddings of D; m parts of a step (`optim.micro_batch`), f = 2 m forward passes, or m = f = 1::

    sent, a step         (W - 1) / W (8 P + 32 m C + 8 (C + L)) + (W - 1) f (16 C + 8 L) + the loss
    between steps        16 P (weights, gradients, momenta, DDP's buckets; AdamW 20 P; stage 2's guide 4 P more)
    a step adds to it    4 N H + the larger of 8 N D + the loss and 12 N D + the passes of one part

for m > 1; else 4 N H + the passes of all views + the loss. The loss is what the docstrings of `ltood_fast.nt_xent` and
`ltood_fast.guided_contrastive` say of it. A re-sampling of stage 1, with K clusters of N_id images by F features, T
iterations of k-means, S steps of refinement, a budget of b images, b_1, b_2, ... of them for the clusters in turn::

    sent                 (W - 1) / W (8 K F (1 + 2 T + 2 S) + 16 K T + 8 b (F + D) + N_id (4 F + 8))
                         + (W - 1) (16 (b_1 + (b_1 + b_2) + ...) + 8 K (S + 1))

The tests measure what is sent and a step in parts; the memory between steps is counted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

ERRORS = (ValueError, TypeError, RuntimeError, OSError, ImportError)
# How torch says that another process is gone or silent: gloo in plain RuntimeErrors, with its source file in them.
SIGNS = ("gloo", "Connection closed by peer", "Connection reset", "Timed out waiting", "did not answer in time",
         "timeout caused pair closure")  # fmt: skip


class TrainingError(RuntimeError):
    """A sentence about a training run that cannot go on."""


def launched_ranks() -> tuple[int, int, int]:
    """(rank, ranks, ranks on this machine) as torchrun started this process; (0, 1, 1) without it."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        return 0, 1, 1
    return tuple(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))


def on_first_rank(function: Callable[[], object]) -> None:
    """Calls `function` on rank 0; the others wait for it, and what it raises is raised on all."""
    if not (dist.is_available() and dist.is_initialized()):
        function()
        return
    failure: list[Exception | None] = [None]
    if dist.get_rank() == 0:
        try:
            function()
        except ERRORS as error:
            failure = [error]
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise failure[0]


@contextmanager
def lost_ranks_named(timeout: float) -> Iterator[None]:
    """Turns what torch raises when another rank is gone into one sentence."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not isinstance(error, dist.DistError) and not any(sign in text for sign in SIGNS):
            raise
        raise TrainingError(
            f"train: another rank of the run ended, or did not answer for run.timeout = {timeout:g} s "
            f"({text.splitlines()[0]}); the last checkpoint is kept, go on with --resume"
        ) from error


def end_ranks() -> None:
    """Rank 0 may take its time for the evaluation: nobody waits for it any more."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def own_part(n: int) -> slice:
    """This rank's rows of n: contiguous, in rank order, the first ranks one longer where they do not divide."""
    if not (dist.is_available() and dist.is_initialized()):
        return slice(0, n)
    sizes = [len(part) for part in torch.arange(n).tensor_split(dist.get_world_size())]
    first = sum(sizes[: dist.get_rank()])
    return slice(first, first + sizes[dist.get_rank()])

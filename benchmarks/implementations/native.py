"""PyTorch itself, eager, compiled and graphed, and ltood_fast."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

import ltood_fast

from ..ops import OPS
from . import plain
from .base import Implementation, partners, unit

LOSSES = tuple(name for name, op in OPS.items() if op.outcome is None)
PLAIN = tuple(name for name in LOSSES if hasattr(plain, name))
HOPPER = ("nt_xent", "supcon", "psd_loss", "stage1_loss", "knn")
OURS = tuple(name for name in OPS if hasattr(ltood_fast, name))


def _eager(op: str) -> Callable:
    return OPS[op].definition


def _plain(op: str) -> Callable:
    return getattr(plain, op)


def _compiled(op: str, source: Callable[[str], Callable] = _eager, **options: object) -> Callable:
    torch._dynamo.reset()  # every case is compiled for its own shapes, as in a training loop
    return torch.compile(source(op), fullgraph=True, dynamic=False, **options)


def cluster_kl_dec(z: Tensor, centroids: Tensor) -> Tensor:
    """DEC as its PyTorch ports write it: N×K×D differences, q, the target p without gradient, KLDivLoss."""
    squared = (z[:, None] - centroids).square().sum(2)
    q = 1 / (1 + squared)
    q = q / q.sum(1, keepdim=True)
    with torch.no_grad():
        weight = q.square() / q.sum(0)
        p = weight / weight.sum(1, keepdim=True)
    return torch.nn.functional.kl_div(q.log(), p, reduction="batchmean")


@cache
def _off_diagonal(n: int, device: torch.device):
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, i, j: i != j, None, None, n, n, device=device)


def _flex_attention() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    attend = torch.compile(flex_attention, dynamic=False)

    def nt_xent(z: Tensor, temperature: float) -> Tensor:
        """The log-sum-exp that attention computes, the diagonal masked out; its values are not used."""
        u = unit(z)
        rows = u[None, None]
        mask = _off_diagonal(len(z), z.device)
        _, lse = attend(rows, rows, rows, block_mask=mask, scale=1 / temperature, return_lse=True)
        positive = (u * u[partners(z)]).sum(1, dtype=torch.float32) / temperature
        return (lse.flatten() - positive).mean()

    return nt_xent


def _ours(op: str, path: str = "sm80") -> Callable:
    os.environ["LTOOD_CUDA_PATH"] = path  # read at every launch on a GPU of compute capability 9.0
    return getattr(ltood_fast, op)


def _our_clip() -> Callable:
    return lambda x, y, temperature: ltood_fast.info_nce(x, y, temperature=temperature, symmetric=True)


def _each(ops: tuple[str, ...], load: Callable[[str], Callable]) -> dict[str, Callable[[], Callable]]:
    return {op: partial(load, op) for op in ops}


IMPLEMENTATIONS = (
    Implementation(
        "eager",
        _each(tuple(OPS), _eager),
        "the definition in plain PyTorch (ltood_fast.reference): obvious rather than quick, it sorts for neighbours, "
        "and for stage1_loss and stage2_loss it computes its similarities once a part; knn and kmeans: matmul and topk "
        "(argmin) in blocks of 2,048 rows",
        kind="baseline",
        package="torch",
    ),
    Implementation(
        "plain",
        _each(PLAIN, _plain),
        "the loss as a careful user would write it: each similarity matrix once, topk instead of a sort",
        kind="baseline",
        package="torch",
    ),
    Implementation(
        "compile",
        _each(LOSSES, _compiled),
        "torch.compile(eager, fullgraph=True, dynamic=False), compiled for the shape, compilation not timed",
        kind="baseline",
        package="torch",
    ),
    Implementation(
        "compile-plain",
        _each(PLAIN, partial(_compiled, source=_plain)),
        "torch.compile(plain, fullgraph=True, dynamic=False)",
        kind="baseline",
        package="torch",
    ),
    Implementation(
        "compile-max-autotune",
        {
            **_each(("nt_xent", "stage1_loss"), partial(_compiled, source=_plain, mode="max-autotune-no-cudagraphs")),
            **_each(("clip", "cluster_kl"), partial(_compiled, mode="max-autotune-no-cudagraphs")),
        },
        "torch.compile(plain, mode='max-autotune-no-cudagraphs'); of eager where there is no plain",
        kind="baseline",
        package="torch",
        devices=("cuda",),
        tested_on="nowhere",
    ),
    Implementation(
        "compile-cudagraph",
        {
            **_each(("nt_xent", "stage1_loss"), partial(_compiled, source=_plain)),
            **_each(("clip", "cluster_kl"), _compiled),
        },
        "torch.compile(plain), of eager where there is no plain, the whole call replayed from a CUDA graph per input "
        "set: no launch overhead",
        kind="baseline",
        package="torch",
        devices=("cuda",),
        graphed=True,
        tested_on="nowhere",
    ),
    Implementation(
        "flex_attention",
        {"nt_xent": _flex_attention},
        "compiled flex_attention(u, u, u, return_lse=True) with an off-diagonal block mask made once; the values are "
        "computed though not used, it cannot leave them out",
        package="torch",
        devices=("cuda",),
        tested_on="nowhere",
    ),
    Implementation(
        "dec",
        {"cluster_kl": lambda: cluster_kl_dec},
        "DEC in the form of its PyTorch ports, N×K×D differences; autograd keeps them",
        package="torch",
    ),
    Implementation(
        "ours",
        {**_each(OURS, _ours), "clip": _our_clip},
        "ltood_fast, backend='auto'; clip is info_nce(symmetric=True), on CUDA its reference",
        kind="ours",
        package="ltood_fast",
    ),
    Implementation(
        "ours-sm90",
        _each(HOPPER, partial(_ours, path="sm90")),
        "ltood_fast with LTOOD_CUDA_PATH=sm90: its Hopper kernels, where the device is one and they take the case",
        kind="ours",
        package="ltood_fast",
        devices=("cuda",),
        tested_on="nowhere",
    ),
    Implementation(
        "ours-cudagraph",
        _each(("nt_xent", "stage1_loss", "cluster_kl"), _ours),
        "ltood_fast, the whole call replayed from a CUDA graph of its own per input set",
        kind="ours",
        package="ltood_fast",
        devices=("cuda",),
        graphed=True,
        tested_on="nowhere",
    ),
)

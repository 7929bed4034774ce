"""A batch spread over ranks, a loss on it on every rank, and the same loss of one process in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import ltood_fast

TAU = 0.3
D = 12

# Local batches of each world size; "even" rows pair up within a rank.
SIZES = {
    1: {"even": [18]},
    2: {"even": [10, 10], "uneven": [14, 6]},
    3: {"even": [8, 8, 8], "uneven": [4, 12, 2]},
    4: {"even": [6, 6, 6, 6], "uneven": [6, 2, 10, 4]},
}

# function, options, and the tensors of the batch that it is given
CASES = {
    "nt_xent": ("nt_xent", {}, ()),
    "nt_xent ids": ("nt_xent", {}, ("instance_ids",)),
    "supcon": ("supcon", {}, ("labels",)),
    "domain": ("domain_loss", {}, ("domain",)),
    "psd": ("psd_loss", {"k": 1}, ()),
    "psd domain k3": ("psd_loss", {"k": 3}, ("instance_ids", "domain", "neighbor_weight")),
    "psd bank": ("psd_loss", {"k": 4}, ("instance_ids", "bank", "bank_ids", "domain", "bank_domain")),
    "stage1": ("stage1_loss", {"k": 2}, ("domain",)),
    "stage1 any domain": ("stage1_loss", {"k": 2, "same_domain": False, "alpha": 0.7}, ("domain", "bank")),
}
OF_A_BANK = ("bank", "bank_ids", "bank_domain", "far")


class Outcome(NamedTuple):
    """What one rank, or one process with the whole batch, returns."""

    losses: list[Tensor]
    lse: Tensor | None
    cosines: Tensor | None
    indices: Tensor | None
    grad_z: Tensor
    grad_temperature: Tensor


def batch(n: int, dtype: torch.dtype, seed: int = 0, d: int = D) -> dict[str, Tensor]:
    """The whole batch: z, ids with one to several views across ranks, two domains, labels, a bank."""
    g = torch.Generator().manual_seed(seed)
    q = 9

    def rows(count: int) -> Tensor:
        return torch.randn(count, d, generator=g, dtype=torch.float64).to(dtype)

    return {
        "z": rows(n),
        "instance_ids": torch.randint(0, n // 2 + 1, (n,), generator=g),
        "labels": torch.randint(-3, 3, (n,), generator=g),
        "domain": torch.randint(0, 2, (n,), generator=g),
        "neighbor_weight": torch.rand(n, generator=g, dtype=torch.float64),
        "bank": rows(q),
        "bank_ids": torch.randint(0, n // 2 + 1, (q,), generator=g),
        "bank_domain": torch.randint(0, 2, (q,), generator=g),
    }


def view_ids(sizes: list[int]) -> Tensor:
    """The default views: rows i and i + n/2 of one rank."""
    first = [sum(sizes[:rank]) for rank in range(len(sizes))]
    return torch.cat([start + torch.arange(n) % (n // 2) for start, n in zip(first, sizes, strict=True)])


def local(tensors: dict[str, Tensor], sizes: list[int], rank: int) -> dict[str, Tensor]:
    """This rank's rows; a bank is whole on every rank."""
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    return {name: x if name in OF_A_BANK else x[own] for name, x in tensors.items()}


def outcome(case: str, tensors: dict[str, Tensor], row_weight: Tensor, reduction: str, **options) -> Outcome:
    """A case with its gradients: of the loss, or ("none") of all rows with their weights; of the log-sum-exp too."""
    function, own_options, names = CASES[case]
    z = tensors["z"].clone().requires_grad_()
    temperature = torch.tensor(TAU, dtype=torch.float64, requires_grad=True)
    given = {name: tensors[name] for name in names}
    searches = {"return_neighbors": True} if "k" in own_options else {}
    loss, lse, *found = getattr(ltood_fast, function)(
        z, temperature=temperature, reduction=reduction, return_lse=True, **own_options, **given, **searches, **options
    )
    losses = list(loss) if isinstance(loss, tuple) else [loss]
    objective = 0.3 * (row_weight * lse).sum()
    for part, value in enumerate(losses):
        objective = objective + (part + 1) * (value * row_weight if reduction == "none" else value).sum()
    objective.backward()
    cosines, indices = found or (None, None)
    losses = [value.detach() for value in losses]
    return Outcome(losses, lse.detach(), cosines, indices, z.grad, temperature.grad)


def on_a_rank(
    rank: int, world: int, case: str, sizes: list[int], dtype: torch.dtype, reduction: str, exchange: str, backend: str
) -> Outcome:
    whole = batch(sum(sizes), dtype)
    own = local({**whole, "row_weight": row_weights(sum(sizes))}, sizes, rank)
    return outcome(
        case, own, own["row_weight"], reduction, group=torch.distributed.group.WORLD, exchange=exchange, backend=backend
    )


def row_weights(n: int) -> Tensor:
    return torch.linspace(0.5, 1.5, n, dtype=torch.float64)


def of_one_process(case: str, sizes: list[int], dtype: torch.dtype, reduction: str) -> Outcome:
    """The float64 reference on the concatenated batch, of the same rounded inputs. Its gradients are of the sum of what
    all ranks return: a loss that is one number on every rank counts once for each rank."""
    whole = {name: x.double() if x.is_floating_point() else x for name, x in batch(sum(sizes), dtype).items()}
    paired = (
        {}
        if "instance_ids" in CASES[case][2] or CASES[case][0] in ("supcon", "domain_loss")
        else {"instance_ids": view_ids(sizes)}
    )
    if reduction == "none":
        return outcome(case, whole, row_weights(sum(sizes)), reduction, backend="reference", **paired)
    ranks = len(sizes)
    result = outcome(case, whole, row_weights(sum(sizes)) / ranks, reduction, backend="reference", **paired)
    return result._replace(grad_z=ranks * result.grad_z, grad_temperature=ranks * result.grad_temperature)

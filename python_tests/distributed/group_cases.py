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
    "nt_xent decoupled": ("nt_xent", {"decoupled": True}, ("instance_ids",)),
    "supcon": ("supcon", {}, ("labels",)),
    "supcon decoupled": ("supcon", {"decoupled": True}, ("labels",)),
    "domain": ("domain_loss", {}, ("domain",)),
    "psd": ("psd_loss", {"k": 1}, ()),
    "psd domain k3": ("psd_loss", {"k": 3}, ("instance_ids", "domain", "neighbor_weight")),
    "psd bank": ("psd_loss", {"k": 4}, ("instance_ids", "bank", "bank_ids", "domain", "bank_domain")),
    "stage1": ("stage1_loss", {"k": 2}, ("domain",)),
    "stage1 any domain": ("stage1_loss", {"k": 2, "same_domain": False, "alpha": 0.7}, ("domain", "bank")),
    "bce": ("domain_loss", {"kind": "bce"}, ("domain", "weight", "bias")),
}
# Cluster 0 has an empty farthest cluster: its rows fall back on all others; those of a small one may, and do where
# their neighbours take it up.
FEW_FAR = torch.tensor([4, 0, 3, 3, 0])
GUIDED_CASES = {
    "guided": ("guided_contrastive", {"k": 2}, ("guide", "clusters", "far")),
    "guided weights": ("guided_contrastive", {"k": 1, "gamma": 2.0, "normalize": False}, ("guide", "clusters", "far")),
    "guided fallback": ("guided_contrastive", {"k": 4, "far": FEW_FAR}, ("guide", "clusters", "instance_ids")),
    "guided given": ("guided_contrastive", {}, ("guide", "clusters", "far", "instance_ids", "pos_idx")),
    "relational": ("relational_distill", {"teacher_temperature": 0.5}, ("guide",)),
    "feature": ("feature_distill", {}, ("guide",)),
    "stage2": ("stage2_loss", {"k": 3}, ("guide", "clusters", "far", "instance_ids")),
    "stage2 feature": ("stage2_loss", {"k": 1, "distill": "feature"}, ("guide", "clusters", "far")),
}
ALL_CASES = {**CASES, **GUIDED_CASES}
OF_ALL_RANKS = ("bank", "bank_ids", "bank_domain", "far", "weight", "bias")
PAIRED = ("nt_xent", "psd_loss", "stage1_loss", "guided_contrastive", "stage2_loss")  # views by default


class Outcome(NamedTuple):
    """What one rank, or one process with the whole batch, returns."""

    losses: list[Tensor]
    lse: Tensor | None
    cosines: Tensor | None
    indices: Tensor | None
    grad_z: Tensor
    grad_others: list[Tensor]
    """Of what all ranks share, a part on each rank: the temperature, or the head of the domain loss."""


def batch(n: int, dtype: torch.dtype, seed: int = 0, d: int = D) -> dict[str, Tensor]:
    """The whole batch: z, ids with one to several views across ranks, two domains, labels, a bank."""
    g = torch.Generator().manual_seed(seed)
    q = 9

    def rows(count: int) -> Tensor:
        return torch.randn(count, d, generator=g, dtype=torch.float64).to(dtype)

    batch = {
        "z": rows(n),
        "instance_ids": torch.randint(0, n // 2 + 1, (n,), generator=g),
        "labels": torch.randint(-3, 3, (n,), generator=g),
        "domain": torch.randint(0, 2, (n,), generator=g),
        "neighbor_weight": torch.rand(n, generator=g, dtype=torch.float64),
        "bank": rows(q),
        "bank_ids": torch.randint(0, n // 2 + 1, (q,), generator=g),
        "bank_domain": torch.randint(0, 2, (q,), generator=g),
        "weight": rows(1)[0],
        "bias": rows(1)[0, 0],
        "guide": rows(n),
        "clusters": torch.randint(0, 4, (n,), generator=g),
        "far": torch.tensor([2, 3, 0, 1]),
        "pos_idx": torch.randint(-1, n, (n, 3), generator=g),
    }
    few = torch.tensor([1, n // 2, n - 1])  # all of cluster 1, which some rows of cluster 3 have as neighbours
    batch["clusters"][batch["clusters"] == 1] = 0
    batch["clusters"][few] = 1
    batch["pos_idx"][(batch["clusters"] == 3) & (torch.arange(n) % 4 > 0)] = few
    return batch


def view_ids(sizes: list[int]) -> Tensor:
    """The default views: rows i and i + n/2 of one rank."""
    first = [sum(sizes[:rank]) for rank in range(len(sizes))]
    return torch.cat([start + torch.arange(n) % (n // 2) for start, n in zip(first, sizes, strict=True)])


def local(tensors: dict[str, Tensor], sizes: list[int], rank: int) -> dict[str, Tensor]:
    """This rank's rows; a bank is whole on every rank."""
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    return {name: x if name in OF_ALL_RANKS else x[own] for name, x in tensors.items()}


def given_of(names: tuple[str, ...], tensors: dict[str, Tensor]) -> dict[str, Tensor | ltood_fast.Bank]:
    """The named tensors as keywords of a function: those of the bank as one argument."""
    given = {name: tensors[name] for name in names}
    if "bank_ids" in given:
        given["bank"] = ltood_fast.Bank(given["bank"], given.pop("bank_ids"), given.pop("bank_domain"))
    return given


def outcome(case: str, tensors: dict[str, Tensor], row_weight: Tensor, reduction: str, **options) -> Outcome:
    """A case with its gradients: of the loss, or ("none") of all rows with their weights; of the log-sum-exp too."""
    function, own_options, names = ALL_CASES[case]
    z = tensors["z"].clone().requires_grad_()
    given = given_of(names, tensors)
    others = [given[name].requires_grad_() for name in ("weight", "bias") if name in given]
    if function != "feature_distill" and not others:
        others = [torch.tensor(TAU, dtype=torch.float64, requires_grad=True)]
        options |= {"temperature": others[0], "return_lse": True}
    if function in ("psd_loss", "stage1_loss"):
        options["return_neighbors"] = True
    result = getattr(ltood_fast, function)(z, reduction=reduction, **own_options, **given, **options)
    loss, lse, *found = result if "return_lse" in options else (result, None)
    losses = list(loss) if isinstance(loss, tuple) else [loss]
    objective = 0 if lse is None else 0.3 * (row_weight * lse).sum()
    for part, value in enumerate(losses):
        objective = objective + (part + 1) * (value * row_weight if reduction == "none" else value).sum()
    objective.backward()
    cosines, indices = found or (None, None)
    losses = [value.detach() for value in losses]
    return Outcome(losses, None if lse is None else lse.detach(), cosines, indices, z.grad, [x.grad for x in others])


def on_a_rank(
    rank: int, world: int, case: str, sizes: list[int], dtype: torch.dtype, reduction: str, exchange: str, backend: str
) -> Outcome:
    whole = batch(sum(sizes), dtype)
    own = local({**whole, "row_weight": row_weights(sum(sizes))}, sizes, rank)
    options = {} if case == "feature" else {"exchange": exchange}
    if case == "bce":
        backend = "auto"
    group = torch.distributed.group.WORLD
    return outcome(case, own, own["row_weight"], reduction, group=group, backend=backend, **options)


def row_weights(n: int) -> Tensor:
    return torch.linspace(0.5, 1.5, n, dtype=torch.float64)


def of_one_process(case: str, sizes: list[int], dtype: torch.dtype, reduction: str) -> Outcome:
    """The float64 reference on the concatenated batch, of the same rounded inputs. Its gradients are of the sum of what
    all ranks return: a loss that is one number on every rank counts once for each rank."""
    whole = {name: x.double() if x.is_floating_point() else x for name, x in batch(sum(sizes), dtype).items()}
    function, _, names = ALL_CASES[case]
    paired = {"instance_ids": view_ids(sizes)} if function in PAIRED and "instance_ids" not in names else {}
    if reduction == "none":
        return outcome(case, whole, row_weights(sum(sizes)), reduction, backend="reference", **paired)
    ranks = len(sizes)
    result = outcome(case, whole, row_weights(sum(sizes)) / ranks, reduction, backend="reference", **paired)
    return result._replace(grad_z=ranks * result.grad_z, grad_others=[ranks * x for x in result.grad_others])

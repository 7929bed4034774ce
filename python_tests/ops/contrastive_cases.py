"""Inputs and the float64 truth that the tests of the contrastive kernels share."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

import ltood_fast
from ltood_fast import Bank
from ltood_fast.reference import contrastive as reference
from ltood_fast.reference._common import unit_rows

Q = 37  # bank rows: no multiple of a vector

# What a case asks for besides z and the temperature; the tensors come from `extras`.
CASES = {
    "nt_xent": {"function": "nt_xent"},
    "nt_xent ids": {"function": "nt_xent", "tensors": ("instance_ids",)},
    "supcon": {"function": "supcon", "tensors": ("labels",)},
    "domain": {"function": "domain_loss", "tensors": ("domain",)},
    "psd": {"function": "psd_loss", "k": 1},
    "psd domain k3": {"function": "psd_loss", "k": 3, "tensors": ("instance_ids", "domain", "neighbor_weight")},
    "psd bank": {
        "function": "psd_loss",
        "k": 4,
        "tensors": ("instance_ids", "bank", "bank_ids", "domain", "bank_domain"),
    },
    "stage1": {"function": "stage1_loss", "k": 1, "tensors": ("domain",)},
    "stage1 any domain": {"function": "stage1_loss", "k": 2, "same_domain": False, "tensors": ("domain", "bank")},
}


class Result(NamedTuple):
    """`losses`: a tensor [N] for each part of the loss; gradients of `objective`, a weighted sum of all of them."""

    losses: tuple[Tensor, ...]
    lse: Tensor
    cosines: Tensor | None
    indices: Tensor | None
    grad_z: Tensor
    grad_temperature: Tensor


def extras(n: int, d: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """One of every optional tensor: ids with one to several views, two domains, more labels than two."""
    return {
        "instance_ids": torch.randint(0, n // 2 + 1, (n,)),
        "labels": torch.randint(-3, 3, (n,)),
        "domain": torch.randint(0, 2, (n,)),
        "neighbor_weight": torch.rand(n, dtype=torch.float64) * (torch.rand(n) > 0.2),
        "bank": torch.randn(Q, d, dtype=torch.float64).to(dtype),
        "bank_ids": torch.randint(0, n // 2 + 1, (Q,)),
        "bank_domain": torch.randint(0, 2, (Q,)),
    }


def arguments_of(case: dict, tensors: dict, device: str = "cpu") -> dict[str, Tensor | Bank]:
    """The tensors of a case by the keywords of its function: those of the bank as one argument."""
    named = {name: tensors[name].to(device) for name in case.get("tensors", ())}
    if "bank_ids" in named:
        named["bank"] = Bank(named["bank"], named.pop("bank_ids"), named.pop("bank_domain"))
    return named


def bank_of(case: dict, tensors: dict, normalize: bool) -> Bank | None:
    """The bank of a case as the reference searches it: with float64 unit rows."""
    bank = Bank.of(arguments_of(case, tensors).get("bank"))
    return None if bank is None else replace(bank, z=unit_rows(bank.z.double(), normalize))


def objective(losses: tuple[Tensor, ...], lse: Tensor) -> Tensor:
    """Every row and part with a weight of its own, the log-sum-exp too (where a row has another)."""
    n = lse.shape[0]
    weight = torch.linspace(0.5, 1.5, n, dtype=lse.dtype, device=lse.device)
    total = sum(((part + 1) * (loss * weight).sum() for part, loss in enumerate(losses)), lse.new_zeros(()))
    return total + 0.3 * (lse.flip(0) * weight).sum() if n > 1 else total


def run_kernel(case: dict, z: Tensor, tau: float, tensors: dict, normalize: bool = True, backend="cpu") -> Result:
    """The op on the device of that backend; its results on the CPU."""
    options = {key: value for key, value in case.items() if key not in ("function", "tensors")}
    device = "cuda" if backend == "cuda" else "cpu"
    named = arguments_of(case, tensors, device)
    if z.shape[0] % 2 and case["function"] in ("nt_xent", "psd_loss", "stage1_loss"):
        named["instance_ids"] = tensors["instance_ids"].to(device)
    searches = "k" in options
    z = z.detach().to(device).requires_grad_()
    temperature = torch.tensor(tau, dtype=torch.float64, device=device, requires_grad=True)
    loss, lse, *found = getattr(ltood_fast, case["function"])(
        z,
        temperature=temperature,
        normalize=normalize,
        reduction="none",
        return_lse=True,
        backend=backend,
        **options,
        **named,
        **({"return_neighbors": True} if searches else {}),
    )
    losses = (loss.psd, loss.domain) if case["function"] == "stage1_loss" else (loss,)
    objective(losses, lse).backward()
    cosines, indices = (x.cpu() for x in found) if found else (None, None)
    losses = tuple(loss.cpu() for loss in losses)
    return Result(losses, lse.cpu(), cosines, indices, z.grad.cpu(), temperature.grad.cpu())


def true_result(case: dict, z: Tensor, tau: float, tensors: dict, normalize: bool, indices: Tensor | None) -> Result:
    """The float64 reference on the same (rounded) inputs, with the neighbours that the kernel chose: which of two equal
    cosines is the larger is rounding, and `assert_neighbors_right` looks at the choice itself."""
    z = z.detach().double().requires_grad_()
    temperature = torch.tensor(tau, dtype=torch.float64, requires_grad=True)
    wanted = case.get("tensors", ())
    u = unit_rows(z, normalize)
    s, lse = reference._similarities(u, temperature)
    losses = []
    if case["function"] in ("nt_xent", "psd_loss", "stage1_loss"):
        ids = tensors["instance_ids"] if "instance_ids" in wanted or z.shape[0] % 2 else None
        lam = tensors["neighbor_weight"] if "neighbor_weight" in wanted else 1.0
        columns = indices if indices is not None else torch.full((z.shape[0], 1), -1)
        bank = bank_of(case, tensors, normalize)
        terms = reference._view_term(s, ids), reference._neighbor_term(u, temperature, lam, bank, columns)
        attraction, weight = (of_views + of_neighbors for of_views, of_neighbors in zip(*terms, strict=True))
        losses.append(reference._row_losses(lse, attraction, weight)[0])
    if case["function"] in ("supcon", "domain_loss", "stage1_loss"):
        labels = tensors["labels"] if "labels" in wanted else tensors["domain"]
        losses.append(reference._mask_losses(s, lse, reference._same_class(s, labels))[0])
    objective(tuple(losses), lse).backward()
    return Result(tuple(losses), lse, None, indices, z.grad, temperature.grad)


def assert_neighbors_right(case: dict, z: Tensor, tensors: dict, normalize: bool, result: Result) -> None:
    """The chosen cosines are the k largest of the admissible ones, within rounding, and belong to their indices."""
    z = z.detach().double()
    wanted = case.get("tensors", ())
    ids = tensors["instance_ids"] if "instance_ids" in wanted or z.shape[0] % 2 else None
    bank = bank_of(case, tensors, normalize)
    restricted = "domain" in wanted and case.get("same_domain", True)
    truth, columns = reference._neighbors(
        unit_rows(z, normalize),
        case["k"],
        ids,
        tensors["domain"] if restricted else None,
        bank,
    )
    found = result.indices >= 0
    assert torch.equal(found, columns >= 0)
    assert torch.equal(found, result.cosines > -torch.inf)
    rows = bank.z if bank is not None else unit_rows(z, normalize)
    of_choice = torch.einsum("nd,nkd->nk", unit_rows(z, normalize), rows[result.indices.clamp(min=0)])
    scale = truth[found].abs().max().item() if found.any() else 1.0
    close = {"rtol": 0, "atol": (1e-13 if result.cosines.dtype == torch.float64 else 1e-6) * max(scale, 1.0)}
    torch.testing.assert_close(result.cosines.double()[found], truth[found], **close)
    torch.testing.assert_close(of_choice[found], truth[found], **close)
    for row in result.indices.tolist():
        chosen = [index for index in row if index >= 0]
        assert len(set(chosen)) == len(chosen)

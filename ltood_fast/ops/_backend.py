"""Which implementation a call runs: our kernel or the plain PyTorch reference."""

from __future__ import annotations

import torch

from .._ext import OP_OF_FUNCTION, has_kernel
from ..reference._common import transformed
from . import _check as check

BACKENDS = ("auto", "reference", "cpu", "cuda")


def use_kernel(function: str, backend: str, *inputs: torch.Tensor | None) -> bool:
    """True when `function` runs its kernel on its `inputs`, False when it runs its reference.

    Args:
        function: public name, e.g. ``"nt_xent"``.
        backend: ``"auto"`` (the kernel if this build has one for the device, else the reference), ``"reference"``, or
            ``"cpu"`` / ``"cuda"`` (that kernel or an error).
        inputs: the embeddings, the first of which says the device. There is no float64 kernel for CUDA.

    The kernels have first derivatives in reverse mode alone. Inside forward-mode AD and the transforms of torch.func,
    which would lose tangents in silence, ``"auto"`` runs the reference.
    """
    device = inputs[0].device
    double_on_cuda = device.type == "cuda" and any(x is not None and x.dtype == torch.float64 for x in inputs)
    check.choice(function, "backend", backend, BACKENDS)
    if backend == "reference":
        return False
    available = has_kernel(OP_OF_FUNCTION[function], device.type)
    if backend == "auto":
        return available and not double_on_cuda and not transformed()
    if backend != device.type:
        raise ValueError(f"{function}: backend={backend!r} needs inputs on a {backend} device, got {device}")
    if not available:
        raise RuntimeError(
            f"{function}: backend={backend!r} was asked for, but this build has no {backend} kernel for it; "
            "use backend='auto' or see ltood_fast.build_info()"
        )
    if double_on_cuda:
        raise TypeError(f"{function}: backend='cuda' takes float32, bfloat16 or float16, got float64")
    if transformed():
        raise RuntimeError(
            f"{function}: backend={backend!r} has no forward-mode derivatives and does not run inside transforms of "
            "torch.func (jvp, grad, hessian, vmap, ...); use backend='auto' or 'reference'"
        )
    return True

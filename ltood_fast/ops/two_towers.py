"""The losses of image-text models: clip_loss and sigmoid_loss, in the names of open_clip."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..reference.two_sets import weighted_rows
from . import _check as check
from ._backend import use_kernel
from ._group import GroupContext, all_of, reduce_parts
from ._info_nce_group import gather_with, gathered_directions
from ._info_nce_op import Options, Pairs, sigmoid_rows
from .info_nce import GATHER

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Words of info_nce's errors, and what they are called here.
_NAMES = {
    "query, positive_key and negative_keys": "image_features and text_features",
    "|query_i| |key_j| / temperature": "|image_i| |text_j| * logit_scale",
    "raise the temperature": "lower logit_scale",
}

__all__ = ["clip_loss", "sigmoid_loss"]


def _check_towers(
    op: str,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    reduction: str,
    normalize: bool,
) -> Tensor:
    """Returns the scale as a 0-d tensor."""
    check.embeddings(op, "image_features", image_features)
    check.same_width(op, "text_features", text_features, "image_features", image_features)
    n, m = image_features.shape[0], text_features.shape[0]
    check.require(n == m, op, "text_features", "of one row for each row of image_features", lambda: f"{m} rows for {n}")
    check.choice(op, "reduction", reduction, check.REDUCTIONS)
    check.flag(op, "normalize", normalize)
    return _scale(op, logit_scale, image_features)


def _number_or_scalar(op: str, argument: str, value: float | Tensor, like: Tensor) -> Tensor:
    """A 0-d tensor. float64 of a number, so that it is rounded once."""
    if not isinstance(value, Tensor):
        value = check.number(op, argument, value)
        return torch.ones((), dtype=torch.float64, device=like.device) * value  # torch.compile keeps it symbolic
    allowed = "a number or a float tensor of one element"
    check.require_type(value.dtype.is_floating_point, op, argument, allowed, value.dtype)
    check.require(value.dim() == 0 or value.shape == (1,), op, argument, allowed, lambda: check.shape_of(value))
    check.same_device(op, argument, value, "image_features", like)
    return value.reshape(())


def _scale(op: str, logit_scale: float | Tensor, like: Tensor) -> Tensor:
    check.temperature(op, logit_scale, "logit_scale")
    return _number_or_scalar(op, "logit_scale", logit_scale, like)


def _in_our_words(op: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls what info_nce's kernels serve; their errors then name this function and its arguments."""
    if torch.compiler.is_compiling():
        return function(*args, **kwargs)
    try:
        return function(*args, **kwargs)
    except ValueError as error:
        text = str(error)
        if not text.startswith(("info_nce: ", f"{op}: ")):
            raise
        for theirs, ours in _NAMES.items():
            text = text.replace(theirs, ours)
        raise ValueError(f"{op}: {text.split(': ', 1)[1]}") from None


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    normalize: bool = False,
    reduction: str = "mean",
    group: ProcessGroup | None = None,
    exchange: str = "gather",
    backend: str = "auto",
) -> Tensor:
    r"""The symmetric contrastive loss of image-text models [Radford et al. 2021].

    :func:`info_nce` of both directions, at the temperature ``1 / logit_scale``. Replaces, without the N×N logits::

        logits = logit_scale * image_features @ text_features.T
        labels = torch.arange(N)
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    Args:
        image_features, text_features: ``[N, D]`` each, normalised by the model as in open_clip.
        logit_scale: positive, a number or a 0-d tensor, which gets its gradient: the exponential, not its logarithm.
        logit_bias: cancels in both directions: it has a gradient of 0.
        normalize: L2-normalise the rows first.
        reduction, group, exchange, backend: as :func:`info_nce`.

    Returns:
        The loss, 0-d (or ``[N]``), float32 (float64 if an input is).

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`info_nce`.
    """
    op = "clip_loss"
    with GroupContext(op, group, reduction, exchange, GATHER) as context:
        scale = _check_towers(op, image_features, text_features, logit_scale, reduction, normalize)
        bias = _number_or_scalar(op, "logit_bias", 0.0 if logit_bias is None else logit_bias, image_features)
        kernel = use_kernel(op, backend, image_features, text_features)
    options = Options(1 / scale.double(), 0.0, decoupled=False, normalize=normalize)
    named = {"logit_scale": scale, "normalize": normalize, "reduction": reduction}
    given = context, kernel, image_features, (text_features, None), options
    sides = _in_our_words(op, gathered_directions, *given, Pairs(symmetric=True), named)
    (loss,) = reduce_parts([weighted_rows(sides, None)], reduction, context)
    return loss if logit_bias is None else loss + 0 * bias.to(loss.dtype)


def sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    *,
    normalize: bool = False,
    reduction: str = "mean",
    group: ProcessGroup | None = None,
    exchange: str = "gather",
    backend: str = "auto",
) -> Tensor:
    r"""The sigmoid loss of all pairs of images and texts [Zhai et al. 2023, algorithm 1].

    ``-(1/N) sum_ij log sigmoid(t_ij (logit_scale <x_i, y_j> + logit_bias))``, t = 1 for j = i, else -1. Replaces,
    without the N×N logits::

        logits = logit_scale * image_features @ text_features.T + logit_bias
        labels = 2 * torch.eye(N) - 1
        loss = -F.logsigmoid(labels * logits).sum() / N

    Args:
        image_features, text_features: ``[N, D]`` each, normalised by the model as in open_clip.
        logit_scale: positive, a number or a 0-d tensor, which gets its gradient: the exponential, not its logarithm.
        logit_bias: a number or a 0-d tensor, which gets its gradient.
        normalize: L2-normalise the rows first.
        reduction: ``"mean"`` of the rows' losses, ``"sum"``, or ``"none"`` (``[N]``: each row over all texts).
        group: as :func:`info_nce`: the texts of all ranks are columns. ``exchange`` must be ``"gather"``.
        backend: as :func:`info_nce`.

    Returns:
        The loss, 0-d (or ``[N]``), float32 (float64 if an input is).

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`info_nce`.
    """
    op = "sigmoid_loss"
    with GroupContext(op, group, reduction, exchange, GATHER) as context:
        scale = _check_towers(op, image_features, text_features, logit_scale, reduction, normalize)
        bias = _number_or_scalar(op, "logit_bias", logit_bias, image_features)
        kernel = use_kernel(op, backend, image_features, text_features)
    target = None
    if context.many:
        named = {"logit_scale": scale, "logit_bias": bias, "normalize": normalize, "reduction": reduction}
        text_features, first = gather_with(text_features, context, named)
        target = torch.arange(len(image_features), device=image_features.device) + first
    options = {"target": target, "normalize": normalize}
    rows = _in_our_words(op, sigmoid_rows, kernel, image_features, text_features, (scale, bias), **options)
    (loss,) = reduce_parts([all_of(rows)], reduction, context)
    return loss

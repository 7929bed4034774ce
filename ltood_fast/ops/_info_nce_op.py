"""torch.ops.ltood_fast.info_nce: its shapes and its gradient, and row losses by kernel or reference."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .._ext import has_kernel
from ..reference import two_sets as reference
from ..reference._common import common_dtype, full_precision
from ..reference.two_sets import Direction
from ._group import all_of
from ._schema import Arguments, call, differentiable, int64, temperature_arguments, varying

if TYPE_CHECKING:
    from ..reference.options import Exclude


class Options(NamedTuple):
    """The options of one call that rows, and not their reduction, depend on."""

    temperature: float | Tensor
    label_smoothing: float
    decoupled: bool
    normalize: bool


class Pairs(NamedTuple):
    """Who is whose positive, who is no negative, and whether the keys are rows too."""

    target: Tensor | None = None
    exclude: Exclude | None = None
    symmetric: bool = False


def info_nce_directions(
    op: str,
    kernel: bool,
    query: Tensor,
    keys: tuple[Tensor, Tensor | None],  # positive_key, negative_keys
    options: Options,
    pairs: Pairs,
) -> list[Direction]:
    """Queries over keys and, if symmetric, keys over queries; by the kernel or by the reference."""
    if not kernel:
        with full_precision(query):
            return reference.directions(
                query,
                keys,
                options.temperature,
                **pairs._asdict(),
                decoupled=options.decoupled,
                label_smoothing=options.label_smoothing,
                normalize=options.normalize,
            )
    exclude = pairs.exclude
    arguments = {
        "query": query,
        "positive_key": keys[0],
        "negative_keys": keys[1],
        "target": int64(pairs.target),
        "query_ids": None if exclude is None else int64(exclude.query_ids),
        "key_ids": None if exclude is None else int64(exclude.key_ids),
        "normalize": options.normalize,
        "symmetric": pairs.symmetric,
        "decoupled": options.decoupled,
        "label_smoothing": options.label_smoothing,
        **temperature_arguments(options.temperature),
    }
    loss, key_loss, lse, key_lse, _ = call("info_nce", op, **arguments)
    return [
        Direction(rows, sums.to(rows.dtype), sums != -torch.inf if options.decoupled else all_of(rows)[1])
        for rows, sums in ((loss, lse), (key_loss, key_lse))[: 1 + pairs.symmetric]
    ]


def sigmoid_rows(
    kernel: bool, image: Tensor, text: Tensor, logit: tuple[Tensor, Tensor], *, target: Tensor | None, normalize: bool
) -> Tensor:
    """Row losses [N] of the sigmoid loss; logit: scale and bias."""
    if not kernel:
        with full_precision(image):
            return reference.sigmoid_rows(image, text, *logit, target=target, normalize=normalize)
    named = {"image_features": image, "text_features": text, "logit_scale": logit[0], "logit_bias": logit[1]}
    return call("sigmoid_loss", "sigmoid_loss", **named, target=target, normalize=normalize)


def _fake(*args, **kwargs):
    given = Arguments("info_nce", args, kwargs)
    n, sides = given.query.shape[0], 2 if given.symmetric else 1
    keys = [key for key in (given.positive_key, given.negative_keys) if key is not None]
    wide = common_dtype(given.query, *keys)

    def empty(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return given.query.new_empty(shape, dtype=dtype)

    m = n if given.symmetric else 0
    return empty(n, dtype=wide), empty(m, dtype=wide), empty(n), empty(m), empty(3 * sides, n)


def _fake_bwd(*args, **kwargs):
    given = Arguments("info_nce_bwd", args, kwargs)
    d, queue = given.query.shape[1], given.negative_keys
    keys = [key for key in (given.positive_key, queue) if key is not None]
    of_queue = given.query.new_empty(0, d)
    if queue is not None:
        of_queue = queue.new_empty(queue.shape[0] if given.need_negative_keys else 0, d)
    return (
        given.query.new_empty(given.query.shape[0] if given.need_query else 0, d),
        given.positive_key.new_empty(given.positive_key.shape[0] if given.need_positive_key else 0, d),
        of_queue,
        given.query.new_empty((), dtype=common_dtype(given.query, *keys)),
    )


def _fake_sigmoid(*args, **kwargs):
    given = Arguments("sigmoid_loss", args, kwargs)
    image = given.image_features
    return image.new_empty(image.shape[0], dtype=common_dtype(image, given.text_features))


def _fake_sigmoid_bwd(*args, **kwargs):
    given = Arguments("sigmoid_loss_bwd", args, kwargs)
    image, text = given.image_features, given.text_features
    number = image.new_empty((), dtype=common_dtype(image, text))
    return (
        image.new_empty(image.shape[0] if given.need_image_features else 0, image.shape[1]),
        text.new_empty(text.shape[0] if given.need_text_features else 0, text.shape[1]),
        number,
        torch.empty_like(number),
    )


if has_kernel("info_nce", "cpu"):
    torch.library.register_fake("ltood_fast::sigmoid_loss", _fake_sigmoid)
    torch.library.register_fake("ltood_fast::sigmoid_loss_bwd", _fake_sigmoid_bwd)
    differentiable("sigmoid_loss")
    torch.library.register_fake("ltood_fast::info_nce", _fake)
    torch.library.register_fake("ltood_fast::info_nce_bwd", _fake_bwd)
    differentiable("info_nce")
    varying("info_nce")

"""The losses between two sets of embeddings as modules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..ops import _check as check
from ..ops.info_nce import check_options, info_nce
from ..reference.options import Denominator
from ._loss import Loss

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._loss import LossOptions


class InfoNCELoss(Loss):
    """Module of :func:`ltood_fast.info_nce`."""

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        symmetric: bool = False,
        denominator: Denominator | None = None,
        label_smoothing: float = 0.0,
        **options: Unpack[LossOptions],
    ) -> None:
        more = {"symmetric": symmetric, "denominator": denominator, "label_smoothing": label_smoothing}
        super().__init__(temperature, options, **more)
        check.flag("InfoNCELoss", "symmetric", symmetric)
        check_options("InfoNCELoss", label_smoothing, denominator)

    def forward(self, query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None, **batch: Any) -> Any:
        """batch: keywords of :func:`ltood_fast.info_nce` that belong to a batch: ``target, exclude, weight``."""
        options = {**self.hyper_parameters, **batch}
        return info_nce(query, positive_key, negative_keys, self.temperature, **options)

"""ClipLoss and SigLipLoss of open_clip."""

from __future__ import annotations

from typing import Any

from open_clip import loss as open_clip
from torch import Tensor

from ..ops.two_towers import clip_loss, sigmoid_loss
from ._calls import CountsCalls, unusual


def _unserved(loss: Any, image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor) -> str:
    if loss.world_size > 1:
        return "several ranks"
    if unusual(image_features, text_features) or len(image_features) != len(text_features):
        return unusual(image_features, text_features) or "rows that do not pair up"
    if isinstance(logit_scale, Tensor) and logit_scale.numel() != 1:
        return "a logit_scale that is no number"
    return "" if logit_scale > 0 else "a logit_scale that is not positive"


def _number(x: float | Tensor) -> float | Tensor:
    return x.reshape(()) if isinstance(x, Tensor) else float(x)


class ClipLoss(CountsCalls, open_clip.ClipLoss):
    """``open_clip.loss.ClipLoss`` without the N×N logits, on one rank; several ranks are open_clip's."""

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        if not self.count(_unserved(self, image_features, text_features, logit_scale)):
            return super().forward(image_features, text_features, logit_scale, logit_bias, output_dict)
        bias = None if logit_bias is None else _number(logit_bias)
        loss = clip_loss(image_features, text_features, _number(logit_scale), bias)
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(CountsCalls, open_clip.SigLipLoss):
    """``open_clip.loss.SigLipLoss`` without the N×N logits, on one rank; several ranks are open_clip's."""

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        if not self.count(_unserved(self, image_features, text_features, logit_scale)):
            return super().forward(image_features, text_features, logit_scale, logit_bias, output_dict)
        bias = 0.0 if logit_bias is None else _number(logit_bias)
        loss = sigmoid_loss(image_features, text_features, _number(logit_scale), bias)
        return {"contrastive_loss": loss} if output_dict else loss

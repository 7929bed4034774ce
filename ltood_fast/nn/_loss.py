"""The base of all losses as modules: a temperature, and the keywords that every call of a loss takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..ops import _check as check
from ..ops._backend import BACKENDS
from ..ops._group import GroupContext

if TYPE_CHECKING:
    from ..ops._typing import SharedOptions

    class LossOptions(SharedOptions, total=False):
        """Keywords of every loss; :func:`ltood_fast.nt_xent` describes them."""

        return_lse: bool


DEFAULTS: LossOptions = {
    "normalize": True,
    "reduction": "mean",
    "return_lse": False,
    "group": None,
    "exchange": "gather",
    "backend": "auto",
}


class Loss(nn.Module):
    """Holds and checks hyper-parameters; an ``nn.Parameter`` as temperature is learned.

    Args:
        options: keywords that all losses share.
        more: keywords of this loss.
    """

    def __init__(self, temperature: float | Tensor, options: LossOptions, **more: object) -> None:
        super().__init__()
        name = type(self).__name__
        if unknown := options.keys() - DEFAULTS.keys():
            raise TypeError(
                f"{name}: keyword must be one of {', '.join([*more, *DEFAULTS])}, got {sorted(unknown)[0]!r}"
            )
        self.temperature = temperature
        self.hyper_parameters = {**more, **DEFAULTS, **options}
        check.temperature(name, temperature)
        shared = self.hyper_parameters
        GroupContext(name, shared["group"], shared["reduction"], shared["exchange"])  # checks them
        check.choice(name, "reduction", shared["reduction"], check.REDUCTIONS)
        check.choice(name, "backend", shared["backend"], BACKENDS)
        for flag in ("normalize", "return_lse"):
            check.flag(name, flag, shared[flag])

    def extra_repr(self) -> str:
        temperature, group = self.temperature, self.hyper_parameters["group"]
        shown = temperature
        if isinstance(temperature, Tensor):
            kind = "parameter" if isinstance(temperature, nn.Parameter) else "tensor"
            shown = kind if temperature.is_meta else f"{kind} {temperature.item():.4g}"
        named = {**self.hyper_parameters, "group": group and group.group_name}
        return ", ".join([f"temperature={shown}", *(f"{key}={value!r}" for key, value in named.items())])

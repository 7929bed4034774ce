"""Everything derived from the schema of an operator: its gradient, and its variant over a process group.

An argument list is written once, in csrc/bindings.cpp. `<op>_bwd` takes `grad_<output>` for every differentiable
output, and outputs and inputs of `<op>` by their own names; it returns `grad_<input>`. So the two schemas say which
outputs are differentiable, what is saved, and where each argument goes.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from ..reference._common import transformed

_LIBRARY = torch.ops.ltood_fast
_PLAIN = (Tensor, torch.nn.Parameter)


def overload(op: str) -> torch._ops.OpOverload:
    return getattr(_LIBRARY, op).default


def _several(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """An operator with one result returns it bare."""
    return (results,) if isinstance(results, Tensor) else tuple(results)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are carried in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Gradient:
    """The gradient of an operator by its backward operator, as an autograd formula."""

    def __init__(self, op: str):
        self.op, self.forward, self.backward = op, overload(op), overload(f"{op}_bwd")
        arguments, takes = self.forward._schema.arguments, [a.name for a in self.backward._schema.arguments]
        gives = [result.name for result in self.backward._schema.returns]
        self.inputs = [a.name for a in arguments if not a.kwarg_only]
        self.outputs = [result.name for result in self.forward._schema.returns]
        self.options = [a.name for a in arguments if a.kwarg_only and a.name in takes]
        self.saved = [name for name in takes if name in (*self.inputs, *self.outputs)]
        self.constant = [i for i, name in enumerate(self.outputs) if f"grad_{name}" not in takes]
        self.received = [(i, f"grad_{name}") for i, name in enumerate(self.outputs) if i not in self.constant]
        self.found = [(name, gives.index(f"grad_{name}")) for name in self.inputs if f"grad_{name}" in gives]
        self.wanted = [(name, f"need_{name}") for name in self.inputs if f"need_{name}" in takes]

    def save(self, ctx, arguments: dict[str, object], outputs: tuple[Tensor, ...]) -> None:
        outputs = _several(outputs)
        ctx.mark_non_differentiable(*(outputs[i] for i in self.constant))
        ctx.set_materialize_grads(False)
        values = arguments | dict(zip(self.outputs, outputs, strict=True))
        ctx.save_for_backward(*(values.get(name) for name in self.saved))
        ctx.options = {name: arguments[name] for name in self.options if name in arguments}

    def run(self, ctx, received: tuple[Tensor | None, ...], needs: dict[str, bool]) -> dict[str, Tensor | None]:
        """Gradients of the inputs by name."""
        saved = dict(zip(self.saved, ctx.saved_tensors, strict=True))
        # torch.compile makes the gradient of an unused output an empty tensor.
        gradients = {name: g if (g := received[i]) is not None and g.shape[0] else None for i, name in self.received}
        if all(gradient is None for gradient in gradients.values()):
            return {}
        wanted = {argument: needs[name] for name, argument in self.wanted}
        found = _several(self.backward(**gradients, **saved, **ctx.options, **wanted))
        return {name: found[at].to(saved[name].dtype) for name, at in self.found if needs[name]}


_GRADIENTS: dict[str, _Gradient] = {}
_FUNCTIONS: dict[str, type[torch.autograd.Function]] = {}
_VARYING: dict[str, list[str]] = {}  # numbers that an operator takes


def differentiable(op: str) -> None:
    """Registers the gradient of ``torch.ops.ltood_fast.<op>`` by ``<op>_bwd``, and refuses a second derivative."""
    gradient = _GRADIENTS[op] = _Gradient(op)

    def setup_context(ctx, inputs, output, keyword_only_inputs=None):  # None: the schema has no keyword-only argument
        gradient.save(ctx, dict(zip(gradient.inputs, inputs, strict=False)) | (keyword_only_inputs or {}), output)

    def run_backward(ctx, *received):
        needs = dict.fromkeys(gradient.inputs, False) | dict(zip(gradient.inputs, ctx.needs_input_grad, strict=False))
        found = gradient.run(ctx, received, needs)
        return tuple(found.get(name) for name in gradient.inputs)

    def keep_name(ctx, inputs, output, keyword_only_inputs=None):
        ctx.public = (keyword_only_inputs or {}).get("op", op)  # over a process group the call says its name

    torch.library.register_autograd(f"ltood_fast::{op}", run_backward, setup_context=setup_context)
    torch.library.register_autograd(f"ltood_fast::{op}_bwd", _refuse_second, setup_context=keep_name)
    _FUNCTIONS[op] = _function(gradient)


def _refuse_second(ctx, *_):
    raise RuntimeError(f"{ctx.public}: double backward is not supported")


class _FirstDerivative(torch.autograd.Function):
    """Gradients of a call that are part of a graph themselves (``create_graph=True``)."""

    @staticmethod
    def forward(ctx, public, count, *tensors):
        ctx.public = public
        return tuple(None if x is None else x.clone() for x in tensors[:count])

    backward = staticmethod(_refuse_second)


def _function(gradient: _Gradient) -> type[torch.autograd.Function]:
    """The same gradient without the dispatcher's detour through Python, for eager calls."""

    def forward(ctx, public, arguments, *_):
        with torch._C._AutoDispatchBelowAutograd():
            outputs = gradient.forward(**arguments)
        gradient.save(ctx, arguments, outputs)
        ctx.public = public
        return outputs

    def backward(ctx, *received):
        names = [name for name, _ in gradient.found]
        with torch._C._AutoDispatchBelowAutograd():
            by_name = gradient.run(ctx, received, dict(zip(names, ctx.needs_input_grad[2:], strict=True)))
        found = [by_name.get(name) for name in names]
        if torch.is_grad_enabled():
            found = _FirstDerivative.apply(ctx.public, len(found), *found, *received, *ctx.saved_tensors)
        return None, None, *found

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(f"{gradient.op}_function", (torch.autograd.Function,), members)


def call(op: str, public: str, /, **arguments: object) -> tuple[Tensor, ...]:
    """Calls a differentiable operator for the public function of that name, which its errors then name.

    Eager calls on plain tensors go through one autograd.Function: at N = 64 the dispatcher's way through
    `torch.library.register_autograd` costs as much again as the rest of the call. Everything else (torch.compile,
    torch.func, tensor subclasses, dispatch modes) goes through the operator.
    """
    if torch.compiler.is_compiling():
        return _traced(op, arguments)
    try:
        return _eager(op, public, arguments)
    except ValueError as error:
        if str(error).startswith(f"{op}: "):
            raise ValueError(f"{public}{str(error).removeprefix(op)}") from None
        raise


def _eager(op: str, public: str, arguments: dict[str, object]) -> tuple[Tensor, ...]:
    if not _is_plain(arguments):
        return overload(op)(**arguments)
    leaves = [arguments.get(name) for name, _ in _GRADIENTS[op].found]
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leaves):
        return _FUNCTIONS[op].apply(public, arguments, *leaves)
    with torch._C._AutoDispatchBelowAutograd():
        return overload(op)(**arguments)


def _is_plain(arguments: dict[str, object]) -> bool:
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and not transformed()
        and all(type(x) in _PLAIN for x in arguments.values() if isinstance(x, Tensor))
    )


def _traced(op: str, arguments: dict[str, object]) -> tuple[Tensor, ...]:
    """The call in a graph, by the variant of the operator where a number varies."""
    numbers = {name: arguments[name] for name in _VARYING.get(op, ()) if arguments.get(name) is not None}
    static = torch.fx.experimental.symbolic_shapes.has_static_value
    if all(static(number) for number in numbers.values()):
        return overload(op)(**arguments)
    one = torch.ones((), dtype=torch.float64)  # torch.compile keeps this product symbolic, torch.full would fix it
    return overload(f"{op}_varying")(**(arguments | {name: one * number for name, number in numbers.items()}))


def not_differentiable(op: str) -> None:
    """The gradient is asked of the loss that calls the operator."""

    def refuse(ctx, *_):
        raise RuntimeError(f"{op}: differentiation is not supported; the loss that calls it implements its gradient")

    torch.library.register_autograd(f"ltood_fast::{op}", refuse)


def constant(op: str) -> None:
    """The outputs of the operator carry no gradient."""
    inputs_ = sum(not argument.kwarg_only for argument in overload(op)._schema.arguments)

    def setup_context(ctx, inputs, output, keyword_only_inputs=None):
        ctx.mark_non_differentiable(*_several(output))

    def run_backward(ctx, *_):
        return (None,) * inputs_

    torch.library.register_autograd(f"ltood_fast::{op}", run_backward, setup_context=setup_context)


def fake_gradients(op: str) -> None:
    """Registers shapes of `<op>_bwd` with a gradient for rows `z` and one for a temperature."""

    @torch.library.register_fake(f"ltood_fast::{op}_bwd")
    def _(*args, **kwargs):
        z = Arguments(f"{op}_bwd", args, kwargs).z
        return z.new_empty(z.shape), z.new_empty((), dtype=wide_dtype(z.dtype))


class Arguments(SimpleNamespace):
    """The arguments of a call of an operator by the names of its schema, defaults included."""

    def __init__(self, op: str, args: tuple, kwargs: dict[str, object]):
        arguments = overload(op)._schema.arguments
        values = {argument.name: argument.default_value for argument in arguments}
        values |= {argument.name: value for argument, value in zip(arguments, args, strict=False)}
        super().__init__(**(values | kwargs))


# Arguments that an operator over a process group takes in addition: whether kernels or the reference serve it, the
# public name of the call, what the ranks have to agree on (lines `name=value`), how rows travel, and the group's name.
# (Not `kernel`: inductor calls operators through a function that has a parameter of that name.)
RANKS = "bool use_kernel, str op, str must_match, str exchange, str group"
RANK_NAMES = [argument.split()[1] for argument in RANKS.split(", ")]


def split_schema(op: str) -> tuple[str, str, str]:
    """(positional arguments, keyword-only arguments, results)"""
    arguments, results = str(overload(op)._schema).split("(", 1)[1].split(") -> ")
    return *arguments.split(", *, "), results


def group_schemas(op: str, more_outputs: str) -> tuple[str, str]:
    """Schemas of `<op>_group` and `<op>_group_bwd`: those of `<op>` with the ranks' options and further outputs, which
    the backward takes too."""
    tensors, options, outputs = split_schema(op)
    takes, _, gives = split_schema(f"{op}_bwd")
    own = takes.removesuffix(f", {tensors}").split(", ")  # without the inputs of the forward
    gradients = ", ".join(x for x in own if " grad_" in x)
    saved = ", ".join(x for x in own if " grad_" not in x)
    forward = f"({tensors}, *, {options}, {RANKS}) -> ({outputs[1:-1]}, {more_outputs})"
    backward = f"({gradients}, {saved}, {more_outputs}, {tensors}, *, {options}, {RANKS}) -> {gives}"
    return forward, backward


def varying(op: str) -> None:
    """Makes `<op>_varying` and its backward: `<op>` with 0-d tensors on the CPU for its numbers.

    To torch.compile a number that an operator takes is a constant, so a schedule of temperatures would be compiled once
    for each of its values. `call` takes this variant where a number varies.
    """
    for name in (op, f"{op}_bwd"):
        tensors, options, results = split_schema(name)
        options = options.split(", ")
        numbers = [option.split("=")[0].split()[1] for option in options if option.startswith("float")]
        others = ", ".join(option for option in options if not option.startswith("float"))
        tensors = ", ".join([tensors, *(f"Tensor? {number}=None" for number in numbers)])
        variant = name.replace(op, f"{op}_varying")
        torch.library.define(f"ltood_fast::{variant}", f"({tensors}, *, {others}) -> {results}")
        _read_numbers(name, variant, numbers)
        _VARYING.setdefault(op, numbers)
    differentiable(f"{op}_varying")


def _read_numbers(op: str, variant: str, numbers: list[str]) -> None:
    """Implements the variant by the operator; shapes do not depend on the numbers."""

    def given(args: tuple, kwargs: dict[str, object]) -> tuple[dict[str, object], dict[str, Tensor]]:
        arguments = vars(Arguments(variant, args, kwargs))
        tensors = {name: arguments.pop(name) for name in numbers}
        return arguments, {name: x for name, x in tensors.items() if x is not None}

    def run(*args, **kwargs):
        arguments, tensors = given(args, kwargs)
        return overload(op)(**arguments, **{name: x.item() for name, x in tensors.items()})

    def fake(*args, **kwargs):
        return overload(op)(**given(args, kwargs)[0])

    torch.library.impl(f"ltood_fast::{variant}", "default", run)
    torch.library.register_fake(f"ltood_fast::{variant}", fake)


def temperature_arguments(temperature: float | Tensor) -> dict[str, object]:
    """A temperature as operators take it: a number, or a tensor, which may be learned."""
    if isinstance(temperature, Tensor):
        return {"temperature_tensor": temperature}
    return {"temperature": float(temperature)}


def int64(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.int64).contiguous()

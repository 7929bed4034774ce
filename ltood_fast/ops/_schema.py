"""What follows from the schema of an operator: its gradient, and its variant over a process group.

An argument list is written once, in csrc/bindings.cpp. `<op>_bwd` takes `grad_<output>` for every differentiable
output, and outputs and inputs of `<op>` by their own names; it returns `grad_<input>`. So the two schemas say which
outputs are differentiable, what is saved, and where each argument goes.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

_LIBRARY = torch.ops.ltood_fast


def overload(op: str) -> torch._ops.OpOverload:
    return getattr(_LIBRARY, op).default


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are carried in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def differentiable(op: str) -> None:
    """Registers the gradient of ``torch.ops.ltood_fast.<op>`` by ``<op>_bwd``, and refuses a second derivative."""
    forward, backward = overload(op), overload(f"{op}_bwd")
    inputs_ = [argument.name for argument in forward._schema.arguments if not argument.kwarg_only]
    outputs_ = [result.name for result in forward._schema.returns]
    takes = [argument.name for argument in backward._schema.arguments]
    options = [a.name for a in forward._schema.arguments if a.kwarg_only and a.name in takes]
    gives = [result.name for result in backward._schema.returns]
    constant = [i for i, name in enumerate(outputs_) if f"grad_{name}" not in takes]
    gradients = [(i, f"grad_{name}") for i, name in enumerate(outputs_) if i not in constant]
    places = {name: at for at, name in enumerate((*inputs_, *outputs_))}
    saved = [name for name in takes if name in places]
    wanted = [(i, f"need_{name}") for i, name in enumerate(inputs_) if f"need_{name}" in takes]
    found_at = [gives.index(f"grad_{name}") if f"grad_{name}" in gives else None for name in inputs_]

    def setup_context(ctx, inputs, keyword_only_inputs, output):
        values = (*inputs, *output)
        ctx.mark_non_differentiable(*(output[i] for i in constant))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(values[places[name]] for name in saved))
        ctx.options = {name: keyword_only_inputs[name] for name in options}
        ctx.dtypes = tuple(x.dtype if isinstance(x, Tensor) else None for x in inputs)

    def run_backward(ctx, *received):
        arguments = dict(zip(saved, ctx.saved_tensors, strict=True)) | ctx.options
        for i, name in gradients:
            # torch.compile makes the gradient of an unused output an empty tensor.
            arguments[name] = received[i] if received[i] is not None and received[i].shape[0] else None
        if all(arguments[name] is None for _, name in gradients):
            return (None,) * len(inputs_)
        needs = ctx.needs_input_grad + (False,) * (len(inputs_) - len(ctx.needs_input_grad))
        arguments |= {name: needs[i] for i, name in wanted}
        found = backward(**arguments)
        needed = zip(found_at, needs, ctx.dtypes, strict=True)
        return tuple(found[at].to(dtype) if at is not None and need else None for at, need, dtype in needed)

    def refuse(ctx, *_):
        raise RuntimeError(f"{op.removesuffix('_group')}: double backward is not supported")

    torch.library.register_autograd(f"ltood_fast::{op}", run_backward, setup_context=setup_context)
    torch.library.register_autograd(f"ltood_fast::{op}_bwd", refuse)


def not_differentiable(op: str) -> None:
    """The gradient is asked of the loss that calls the operator."""

    def refuse(ctx, *_):
        raise RuntimeError(f"{op}: differentiation is not supported; the loss that calls it implements its gradient")

    torch.library.register_autograd(f"ltood_fast::{op}", refuse)


def constant(op: str) -> None:
    """The outputs of the operator carry no gradient."""
    inputs_ = sum(not argument.kwarg_only for argument in overload(op)._schema.arguments)

    def setup_context(ctx, inputs, keyword_only_inputs, output):
        ctx.mark_non_differentiable(*output)

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


# What an operator over a process group takes in addition: whether kernels or the reference serve it, the public name of
# the call, what the ranks have to agree on (lines `name=value`), how rows travel, and the group's name.
RANKS = "bool kernel, str op, str must_match, str exchange, str group"
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
        VARYING.setdefault(op, numbers)
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


VARYING: dict[str, list[str]] = {}


def call(op: str, arguments: dict[str, object]) -> tuple[Tensor, ...]:
    """The outputs of the operator, of arguments by name."""
    if op in VARYING and torch.compiler.is_compiling():
        static = torch.fx.experimental.symbolic_shapes.has_static_value
        numbers = [name for name in VARYING[op] if arguments.get(name) is not None and not static(arguments[name])]
        if numbers:
            one = torch.ones((), dtype=torch.float64)  # torch.compile keeps this product symbolic, torch.full does not
            tensors = {name: one * arguments[name] for name in VARYING[op] if arguments.get(name) is not None}
            return overload(f"{op}_varying")(**{**arguments, **tensors})
    return overload(op)(**arguments)


def temperature_arguments(temperature: float | Tensor) -> dict[str, object]:
    """A temperature as operators take it: a number, or a tensor, which may be learned."""
    if isinstance(temperature, Tensor):
        return {"temperature_tensor": temperature}
    return {"temperature": float(temperature)}


def int64(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.int64).contiguous()

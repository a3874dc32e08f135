"""Which rule answers for which operator, and what a rule is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from automerge._errors import AutomergeError
from automerge._opaque import CLASSES, OpaqueModule
from automerge.rules._digits import computed
from automerge.rules._engine import Engine
from automerge.rules._folding import folded
from automerge.rules._value import Value

Rule = Callable[..., Any]
_RULES: dict[str, Rule] = {}


@dataclass
class Context:
    """What a rule may ask besides its arguments.

    Attributes:
        engine: the operations rules are made of.
        node: the fx node; ``node.meta["val"]`` is the example output.
        used: which outputs of the node anyone reads (a set of indices; ``{0}`` for a single output).
        statistics: collects the values that are normalisation statistics.
        first: node -> the first node that computes the same.
    """

    engine: Engine
    node: Any
    used: set[int]
    statistics: list[Value]
    first: Callable[[fx.Node], fx.Node] = lambda node: node

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the (single) output."""
        return tuple(self.node.meta["val"].shape)

    def out(self, index: int) -> torch.Tensor:
        """The example value of one of several outputs."""
        return self.node.meta["val"][index]


def operator_name(target: Any) -> str:
    """``"aten::addmm"`` for an OpOverload or OpOverloadPacket; the plain name for anything else."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name
    if isinstance(target, str):
        return target if "::" in target else target.replace(".", "::", 1)
    if isinstance(target, OpaqueModule):
        return f"{type(target.module).__name__} {target.path}"
    if isinstance(target, torch._ops.OpOverloadPacket):
        return target._qualified_op_name
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', target)}"


_CARRYING: set[str] = set()
_UNTAGGED = {  # pointwise, not tagged as such
    *(torch.ops.aten.complex, torch.ops.aten.polar, torch.ops.aten.floor_divide, torch.ops.aten._neg_view),
}
_MODULE_RULES: dict[type[nn.Module], Rule] = {}


def rule(*names: str, carries: bool = False) -> Callable[[Rule], Rule]:
    """Register a function as the rule of ATen operators, by their names without namespace.

    ``carries``: the rule itself sees to the obligations of its operands (see `Value`).
    """

    def add(fn: Rule) -> Rule:
        for name in names:
            _RULES[f"aten::{name}"] = fn
            if carries:
                _CARRYING.add(f"aten::{name}")
        return fn

    return add


def register_rule(operator: Any, rule: Rule | None = None) -> Any:
    """Register the rule of an operator or of a module class; also usable as a decorator.

    Args:
        operator: an OpOverload, an OpOverloadPacket, a name such as ``"mylib::my_op"``, or a subclass of `torch.nn.Module`
            whose instances are then traced as one node.
        rule: ``rule(context, *args, **kwargs)`` with a `Value` in place of every tensor argument; for a module class
            ``rule(context, state, *args, **kwargs)`` with ``state`` a dict from the module's own parameter and buffer names
            to values. It returns the `Value` of the output, or a tuple of them. ``context.engine`` holds the operations
            (`Engine.elementwise`, `reduce`, `contract`, `take`, `pin_all`, ...).

    Returns:
        The rule.

    Raises:
        AutomergeError: for what is no operator, or a rule that cannot be called.

    Examples:
        >>> @register_rule("mylib::scaled")
        ... def scaled(context, x, factor):
        ...     return context.engine.elementwise([x])
    """
    module = isinstance(operator, type) and issubclass(operator, nn.Module)
    if not isinstance(operator, str) and not callable(operator):
        raise AutomergeError(
            f"register_rule takes an operator of torch.ops, its name, or a class of modules, got {operator!r}"
        )
    if rule is None:
        return lambda fn: register_rule(operator, fn)
    if not callable(rule):
        raise AutomergeError(f"the rule of {operator} is a {type(rule).__name__}, which cannot be called")
    if module:
        CLASSES.add(operator)
        _MODULE_RULES[operator] = rule
        return rule
    _RULES[operator_name(operator)] = rule
    _CARRYING.discard(operator_name(operator))
    return rule


def find_rule(target: Any) -> Rule | None:
    """The rule of an operator, or None; pointwise operators share one."""
    if isinstance(target, OpaqueModule):
        return _MODULE_RULES.get(type(target.module))
    found = _RULES.get(operator_name(target))
    return pointwise if found is None and is_pointwise(target) else found


def is_pointwise(target: Any) -> bool:
    """Whether an operator is a function of its operands' entries at the same (broadcast) position."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return torch.Tag.pointwise in target.tags or target.overloadpacket in _UNTAGGED


def carries(target: Any) -> bool:
    """Whether an operator's rule sees to the obligations of its operands."""
    return operator_name(target) in _CARRYING or find_rule(target) is pointwise


def values_in(args: Sequence[Any]) -> list[Value]:
    """All values among arguments, lists searched."""
    found: list[Value] = []
    for a in args:
        if isinstance(a, Value):
            found.append(a)
        elif isinstance(a, list | tuple):
            found += values_in(a)
        elif isinstance(a, dict):
            found += values_in(list(a.values()))
    return found


def distinct_from(values: Sequence[Value], result: Any) -> Any:
    """A rule's result, as a copy where it is an operand itself: pieces and choices are known by the value they are of."""
    if isinstance(result, Value):
        return result.with_axes(result.axes) if any(result is v for v in values) else result
    out: list[Any] = []
    for one in result:
        out.append(distinct_from([*values, *values_in(out)], one) if isinstance(one, Value) else one)
    return tuple(out)


def pointwise(context: Context, *args: Any, **kwargs: Any) -> Value:
    """A function of the operands at the same broadcast position."""
    values = values_in([*args, *kwargs.values()])
    together = folded(context.engine, operator_name(context.node.target), args, not kwargs)
    if together is not None:
        return together
    dtype = getattr(context.node.meta["val"], "dtype", None)
    named = computed(context.engine, operator_name(context.node.target), args, kwargs, dtype)
    if named is not None:
        return named
    random = torch.Tag.nondeterministic_seeded in getattr(context.node.target, "tags", ())
    if all(v is values[0] for v in values) and values[0].origin is not None and not random:
        return values[0].after(function_name(context.node))
    out = context.engine.elementwise([v.settle() for v in values])
    if len(values) > 1:
        return out
    one = distinct_from(values, out)
    key = (id(values[0]), function_name(context.node))
    return one if random else context.engine.functions.setdefault(key, (one, values[0]))[0]


def function_name(node: fx.Node) -> str:
    """An operator and its arguments but for the tensor: equal for equal functions of one tensor."""
    return repr((str(node.target), [None if isinstance(a, fx.Node) else a for a in node.args], dict(node.kwargs)))

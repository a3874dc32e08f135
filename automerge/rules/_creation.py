"""Operators that make tensors: constants and random numbers."""

from __future__ import annotations

from typing import Any

import torch

from automerge.rules._axes import Unruled
from automerge.rules._movement import expanded
from automerge.rules._registry import Context, rule
from automerge.rules._value import Value, plain


@rule("fill", "full_like", "zeros_like", "ones_like", "new_zeros", "new_ones", "new_full", "empty_like", "new_empty",
      "zero", "zeros", "ones", "full", "empty", "new_empty_strided", "empty_strided",
      carries=True)  # fmt: skip
def filled(context: Context, *args: Any, **__: Any) -> Value:
    if len(args) > 1 and isinstance(args[1], Value) and args[1].shape == ():
        return expanded(args[1], context.shape)
    return plain(context.shape)


@rule("_new_zeros_with_same_feature_meta", carries=True)  # tangents of `torch.func.jvp`
def blank(context: Context, *_: Any, **__: Any) -> Value:
    """Zeros, whatever the operands hold."""
    return plain(context.shape)


@rule("rand_like", "randn_like", "randint_like", "rand", "randn", "randint", "randperm", carries=True)
def noise(context: Context, *_: Any, **__: Any) -> Value:
    """Random numbers: every position has its own."""
    return plain(context.shape, pinned=True)


@rule("bernoulli", "normal", "uniform", "exponential", "poisson", "native_dropout", "binomial", "cauchy",
      "log_normal", "geometric", "random", "normal_functional")  # fmt: skip
def sampled(context: Context, *args: Any, **__: Any) -> Any:
    """A sample from a distribution given by the operands: they meet noise that has its own value everywhere."""
    value = context.node.meta["val"]
    if not isinstance(value, torch.Tensor) or any(v.shape != tuple(value.shape) for v in args if isinstance(v, Value)):
        raise Unruled("a sample of another shape")
    operands = [v for v in args if isinstance(v, Value)]
    return context.engine.elementwise([*operands, plain(value.shape, pinned=True)])


@rule("multinomial")
def drawn(context: Context, weights: Value, *_: Any, **__: Any) -> Value:
    """Positions of the weights' last axis, drawn for every row."""
    context.engine.pin_all(weights, "positions are drawn from it")
    return plain(context.shape, pinned=True)

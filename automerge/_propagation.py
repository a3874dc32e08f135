"""Means and covariances of activations without data: Gaussian moments, propagated through a traced graph.

Every value is taken as Gaussian across its channels and independent across pixels and tokens. A linear map then gives exact
moments; a nonlinearity gives its exact mean and variance per channel, and covariances to first order (each channel's mean
slope times the covariance before: the first term of the Hermite series). What else an operator would need is not guessed:
its value is *unknown*, and so is what follows.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from automerge._gauss import Gaussian, nonlinear
from automerge._places import VIEWS, operator_of

_LARGEST = 4096
_UNUSED = (None,) * 4  # what a normalisation returns beside its output
_SAME = frozenset({"clone", "detach", "alias", "contiguous", "_to_copy", "lift_fresh", "dropout"})


OnSite = Callable[[fx.Node, str, Gaussian], tuple[torch.Tensor, torch.Tensor] | None]


def _args(node: fx.Node) -> list[Any]:
    return list(node.args)


def _target(node: fx.Node) -> Any:
    return node.target


def _mapped(node: fx.Node, value: Callable[[fx.Node], Any]) -> tuple[Any, Any]:
    """An operator's arguments with values in the place of nodes."""
    made: Any = fx.node.map_aggregate((node.args, node.kwargs), lambda a: value(a) if isinstance(a, fx.Node) else a)
    return made[0], made[1]


class UnknownError(Exception):
    """The moments of a value cannot be predicted."""


def propagate(
    graph: fx.GraphModule, state: Mapping[str, torch.Tensor], on_site: OnSite, spread: tuple[float, float] = (0.0, 1.0)
) -> dict[fx.Node, str]:
    """Walk a traced graph with Gaussian moments.

    Args:
        graph: the trace; any values.
        state: parameters and buffers by their first names.
        on_site: called at every linear map and convolution of a whole named weight, with the node, the weight's name and
            the moments of the complete output (after the bias, as far as the next operator adds it); may return scale and
            shift by which the output is corrected.
        spread: mean and standard deviation of the inputs' entries, taken as independent.

    Returns:
        Nodes that depend on the inputs and whose moments are unknown -> why.
    """
    walk = _Walk(graph, state, on_site, spread)
    for node in graph.graph.nodes:
        walk.visit(node)
    return walk.unknown


class _Walk:
    def __init__(
        self, graph: fx.GraphModule, state: Mapping[str, torch.Tensor], on_site: OnSite, spread: tuple[float, float]
    ) -> None:
        self.graph, self.state, self.on_site, self.spread = graph, state, on_site, spread
        self.held: dict[fx.Node, Any] = {}  # Gaussian, a tensor that no input enters, or a tuple of them
        self.unknown: dict[fx.Node, str] = {}
        self.pending: dict[fx.Node, str] = {}

    def visit(self, node: fx.Node) -> None:
        if node.op == "output":
            return
        lost = next((n for n in node.all_input_nodes if n in self.unknown), None)
        if lost is not None:
            self.unknown[node] = self.unknown[lost]
            return
        try:
            self.held[node] = self._value(node)
        except UnknownError as error:
            place = f" in {node.meta['module']}" if node.meta.get("module") else ""
            self.unknown[node] = f"{error}{place}"

    def _value(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self._placeholder(node)
        if node.op == "get_attr":
            return getattr(self.graph, str(node.target)).cpu()
        if node.target is operator.getitem:
            return self.held[_args(node)[0]][_args(node)[1]]
        moving = [n for n in node.all_input_nodes if isinstance(self.held[n], Gaussian | tuple)]
        if not moving:
            args, kwargs = _mapped(node, lambda n: self.held[n])
            here = {"device": "cpu"} if kwargs.get("device") is not None else {}  # all of the work is done on the CPU
            return _target(node)(*args, **{**kwargs, **here})
        values = (*(self.held[n] for n in node.all_input_nodes), node.meta.get("val"))
        if any(isinstance(v, torch.Tensor) and v.is_complex() for v in values):
            raise UnknownError("complex numbers have no moments of one number each")
        name = operator_of(node)
        rule = _RULES.get(name)
        if rule is not None:
            return rule(self, node)
        if name in _SAME:
            return self.held[moving[0]]
        if name in VIEWS or name in ("slice", "select", "reshape", "_reshape_alias"):
            return _moved(self.held[moving[0]], node, name)
        return self._pointwise(node, name, moving)

    def _placeholder(self, node: fx.Node) -> Any:
        if node.meta["kind"] == "state":
            return self.state[node.meta["name"]].detach().cpu()
        value = node.meta["val"]
        if not value.is_floating_point():
            return Gaussian(torch.zeros(0), torch.zeros(0, 0), None, tuple(value.shape))  # indices
        mean, std = (torch.tensor([v], dtype=torch.float64) for v in self.spread)
        return Gaussian(mean, std.square()[None], None, tuple(value.shape))

    def _pointwise(self, node: fx.Node, name: str, moving: list[fx.Node]) -> Gaussian:
        known = torch.Tag.pointwise in getattr(node.target, "tags", ()) or name in ("hardswish", "mish", "relu6")
        value = self.held[moving[0]]
        if not known or len(moving) > 1 or not isinstance(value, Gaussian) or not len(value.mean):
            raise UnknownError(f"the moments after {name} are not known")
        others = [self.held[n] for n in node.all_input_nodes if n not in moving]
        if any(isinstance(o, torch.Tensor) and o.numel() > 1 for o in others):
            raise UnknownError(f"the moments after {name} with a tensor are not known")

        def function(x: torch.Tensor) -> torch.Tensor:
            args, kwargs = _mapped(node, lambda n: x if n is moving[0] else self.held[n])
            return _target(node)(*args, **kwargs)

        return nonlinear(value, function, name)

    # ---------------------------------------------------------------- linear maps
    def site(self, node: fx.Node, weight: fx.Node, value: Gaussian) -> Gaussian:
        """Report a linear map whose weight is a whole named tensor, now or when its bias has been added."""
        while operator_of(weight) in ("t", "transpose", "permute", "detach", "alias", "view"):
            weight = weight.all_input_nodes[0]
        if weight.op != "placeholder" or weight.meta["kind"] != "state":
            return value
        name = weight.meta["name"]
        users = list(node.users)
        if operator_of(node) != "addmm" and len(users) == 1 and self._adds_bias(self._past_views(users[0]), node):
            self.pending[self._past_views(users[0])] = name
            return value
        return self.report(node, name, value)

    def report(self, node: fx.Node, name: str, value: Gaussian) -> Gaussian:
        change = self.on_site(node, name, value)
        return value if change is None else value.affine(change[0], change[1])

    def _past_views(self, node: fx.Node) -> fx.Node:
        while operator_of(node) in VIEWS and len(node.users) == 1:
            node = next(iter(node.users))
        return node

    def _adds_bias(self, node: fx.Node, source: fx.Node) -> bool:
        if operator_of(node) != "add" or not all(isinstance(a, fx.Node) for a in _args(node)[:2]):
            return False
        return any(a.op == "placeholder" and a.meta["kind"] == "state" for a in _args(node)[:2])

    def linear(self, node: fx.Node, data: Any, weight: Any, bias: Any) -> Gaussian:
        """``x @ w + b`` along the last axis."""
        x, w = self.held[data], self.held[weight]
        if not isinstance(x, Gaussian) or not isinstance(w, torch.Tensor) or not len(x.mean):
            raise UnknownError("a product of activations")
        x = x.over(-1)
        if x.axis != len(x.shape) - 1 or w.ndim != 2:
            raise UnknownError("a linear map across other axes than the channels")
        w = w.double()
        mean = x.mean @ w
        b = self.held[bias].double() if isinstance(bias, fx.Node) else None
        if b is not None and b.ndim == 1:
            mean = mean + b
        elif b is not None:
            raise UnknownError("a sum with a product")
        shape = (*x.shape[:-1], w.shape[1])
        return self.site(node, weight, Gaussian(mean, w.T @ x.covariance @ w, len(shape) - 1, shape))


def _addmm(walk: _Walk, node: fx.Node) -> Gaussian:
    if isinstance(walk.held[_args(node)[0]], Gaussian):
        raise UnknownError("a sum with a product")
    return walk.linear(node, _args(node)[1], _args(node)[2], _args(node)[0])


def _mm(walk: _Walk, node: fx.Node) -> Gaussian:
    return walk.linear(node, _args(node)[0], _args(node)[1], None)


def _convolution(walk: _Walk, node: fx.Node) -> Gaussian:
    x, w = walk.held[_args(node)[0]], walk.held[_args(node)[1]]
    if not isinstance(x, Gaussian) or not isinstance(w, torch.Tensor) or _args(node)[6] or not len(x.mean):
        raise UnknownError("a transposed convolution, or one with computed weights")
    x = x.over(1)
    if x.axis != 1:
        raise UnknownError("a convolution across other axes than the channels")
    groups = int(_args(node)[8])
    kernel = w.double().flatten(2)
    whole = torch.zeros(len(w), len(x.mean), kernel.shape[2], dtype=torch.float64)
    rows, columns = len(w) // groups, len(x.mean) // groups
    for k in range(groups):
        whole[k * rows : (k + 1) * rows, k * columns : (k + 1) * columns] = kernel[k * rows : (k + 1) * rows]
    mean = (whole.sum(2) * x.mean).sum(1)
    bias = walk.held[_args(node)[2]] if isinstance(_args(node)[2], fx.Node) else None
    mean = mean if bias is None else mean + bias.double()
    covariance = torch.einsum("oik,ij,pjk->op", whole, x.covariance, whole)
    return walk.site(node, _args(node)[1], Gaussian(mean, covariance, 1, tuple(node.meta["val"].shape)))


def _batch_norm(walk: _Walk, node: fx.Node) -> Any:
    names = [a.name for a in _target(node)._schema.arguments]
    given = {n: (walk.held[a] if isinstance(a, fx.Node) else a) for n, a in zip(names, _args(node), strict=False)}
    x = given["input"]
    if given.get("training") or not isinstance(x, Gaussian) or given.get("running_var") is None:
        raise UnknownError("a normalisation by the batch's own statistics")
    x = x.over(1)
    scale = (given["running_var"].double() + float(given["eps"])).rsqrt()
    if given.get("weight") is not None:
        scale = scale * given["weight"].double()
    shift = -given["running_mean"].double() * scale
    if given.get("bias") is not None:
        shift = shift + given["bias"].double()
    return (x.affine(scale, shift), *_UNUSED)


def _layer_norm(walk: _Walk, node: fx.Node) -> Any:
    x, shape, weight, bias, eps = (walk.held[a] if isinstance(a, fx.Node) else a for a in _args(node)[:5])
    if len(shape) != 1 or not isinstance(x, Gaussian):
        raise UnknownError("a layer norm over several axes")
    x = x.over(-1)
    if x.axis != len(x.shape) - 1:
        raise UnknownError("a layer norm across other axes than the channels")
    n = len(x.mean)
    centre = torch.eye(n, dtype=torch.float64) - 1 / n
    mean, covariance = centre @ x.mean, centre @ x.covariance @ centre
    # the norm is taken as constant, at its root mean square
    size = ((mean.square().sum() + covariance.trace()) / n + eps).rsqrt()
    out = replace(x, mean=mean, covariance=covariance).affine(size, torch.zeros((), dtype=torch.float64))
    scale = torch.ones(n, dtype=torch.float64) if weight is None else weight.double()
    return (out.affine(scale, torch.zeros(n, dtype=torch.float64) if bias is None else bias.double()), *_UNUSED)


def _sum(walk: _Walk, node: fx.Node) -> Gaussian:
    """add, sub: with a number, a parameter of one value per channel, or an independent value."""
    sign = -1.0 if operator_of(node) == "sub" else 1.0
    sign *= float(str(node.kwargs.get("alpha", 1)))
    one, two = (walk.held[a] if isinstance(a, fx.Node) else a for a in _args(node)[:2])
    if isinstance(one, Gaussian) and isinstance(two, Gaussian):
        if one.axis != two.axis or one.mean.shape != two.mean.shape:
            raise UnknownError("a sum of values with other channels")
        if one is two:
            return one.affine(torch.tensor(1.0 + sign, dtype=torch.float64), torch.zeros((), dtype=torch.float64))
        return replace(one, mean=one.mean + sign * two.mean, covariance=one.covariance + sign**2 * two.covariance)
    x, other = (one, two) if isinstance(one, Gaussian) else (two, one)
    if not isinstance(x, Gaussian) or not len(x.mean):
        raise UnknownError("a sum of indices")
    shift, x = _per_channel(other, x)
    unit = torch.ones((), dtype=torch.float64)
    out = x.affine(unit, sign * shift) if isinstance(one, Gaussian) else x.affine(sign * unit, shift)
    return walk.report(node, walk.pending.pop(node), out) if node in walk.pending else out


def _product(walk: _Walk, node: fx.Node) -> Gaussian:
    one, two = (walk.held[a] if isinstance(a, fx.Node) else a for a in _args(node)[:2])
    if isinstance(one, Gaussian) and isinstance(two, Gaussian):
        raise UnknownError("a product of activations")
    x, other = (one, two) if isinstance(one, Gaussian) else (two, one)
    if operator_of(node) == "div" and x is not one:
        raise UnknownError("a quotient")
    if not len(x.mean):
        raise UnknownError("a product with indices")
    scale, x = _per_channel(other, x)
    return x.affine(1 / scale if operator_of(node) == "div" else scale, torch.zeros((), dtype=torch.float64))


def _per_channel(other: Any, x: Gaussian) -> tuple[torch.Tensor, Gaussian]:
    """A number, or a tensor of one value per channel."""
    if not isinstance(other, torch.Tensor):
        return torch.tensor(float(other), dtype=torch.float64), x
    if other.numel() == 1:
        return other.double().reshape(()), x
    long = [k - other.ndim for k, n in enumerate(other.shape) if n > 1]
    if len(long) == 1:
        x = x.over(long[0])
    if len(long) != 1 or x.axis != len(x.shape) + long[0] or other.numel() != len(x.mean):
        raise UnknownError("a tensor that is not one value per channel")
    return other.double().reshape(-1), x


def _embedding(walk: _Walk, node: fx.Node) -> Gaussian:
    table = walk.held[_args(node)[0]]
    if not isinstance(table, torch.Tensor):
        raise UnknownError("an embedding of activations")
    rows = table.double()
    shape = tuple(node.meta["val"].shape)
    return Gaussian(rows.mean(0), torch.cov(rows.T, correction=0).reshape(rows.shape[1], -1), len(shape) - 1, shape)


def _mean(walk: _Walk, node: fx.Node) -> Gaussian:
    """An average over other axes than the channels, of independent entries."""
    x = walk.held[_args(node)[0]]
    before, after = x.shape, tuple(node.meta["val"].shape)
    if x.axis is None:
        raise UnknownError("an average of inputs")
    if operator_of(node) == "mean":
        dims = {
            d % len(before) for d in (_args(node)[1] if len(_args(node)) > 1 and _args(node)[1] else range(len(before)))
        }
        if x.axis in dims:
            raise UnknownError("an average over channels")
        count = math.prod(before[d] for d in dims)
        keeps = len(after) == len(before)
        axis = x.axis if keeps else x.axis - sum(d < x.axis for d in dims)
    elif operator_of(node) == "avg_pool2d":
        kernel = [int(str(k)) for k in _args(node)[1]]
        count, axis = math.prod(kernel * (3 - len(kernel))), x.axis
    else:
        count, axis = max(math.prod(before[2:]) // max(math.prod(after[2:]), 1), 1), x.axis
    return Gaussian(x.mean, x.covariance / count, axis, after)


_RULES: dict[str, Callable[[_Walk, fx.Node], Any]] = {
    "addmm": _addmm,
    "mm": _mm,
    "convolution": _convolution,
    "native_batch_norm": _batch_norm,
    "cudnn_batch_norm": _batch_norm,
    "_native_batch_norm_legit_no_training": _batch_norm,
    "native_layer_norm": _layer_norm,
    "add": _sum,
    "sub": _sum,
    "mul": _product,
    "div": _product,
    "embedding": _embedding,
    "mean": _mean,
    "avg_pool2d": _mean,
    "_adaptive_avg_pool2d": _mean,
}


def _moved(x: Any, node: fx.Node, name: str) -> Gaussian:
    """The moments after a view: the channel axis is followed; pixels that join it are independent copies."""
    if not isinstance(x, Gaussian):
        raise UnknownError(f"{name} of several values")
    before, after = x.shape, tuple(node.meta["val"].shape)
    if x.axis is None or not len(x.mean):
        return replace(x, shape=after)
    n, left = before[x.axis], math.prod(before[: x.axis])
    if name in ("permute", "transpose", "t", "slice", "select"):
        return replace(x, axis=_followed(x.axis, node, name, before), shape=after)
    right = math.prod(before[x.axis + 1 :])
    for k, size in enumerate(after):
        if math.prod(after[:k]) == left and size == n:
            return replace(x, axis=k, shape=after)
    for k, size in enumerate(after):
        if math.prod(after[:k]) == left and size == n * right and size <= _LARGEST:
            mean = x.mean.repeat_interleave(right)
            return Gaussian(mean, torch.kron(x.covariance, torch.eye(right, dtype=torch.float64)), k, after)
    raise UnknownError(f"{name} that mixes channels with other axes")


def _followed(axis: int, node: fx.Node, name: str, before: tuple[int, ...]) -> int:
    """Where an axis goes."""
    ndim = len(before)
    if name == "t":
        return 1 - axis if ndim == 2 else axis
    if name == "transpose":
        a, b = (int(k) % ndim for k in _args(node)[1:3])
        return {a: b, b: a}.get(axis, axis)
    if name == "permute":
        return [int(k) % ndim for k in _args(node)[1]].index(axis)
    at = int(_args(node)[1]) % ndim if len(_args(node)) > 1 else 0
    if at == axis:
        raise UnknownError(f"{name} of channels")
    return axis - 1 if name == "select" and at < axis else axis

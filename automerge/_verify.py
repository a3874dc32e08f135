"""Verification: random group elements on a float64 copy with randomised weights and statistics."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from automerge._double import double_precision, widen
from automerge._errors import InvarianceError, SymmetryError, TraceError
from automerge._subject import Change, Subject, fresh_inputs, named_tensors, randomised, unchanged
from automerge._tree_io import map_tensors, tensors_of
from automerge.groups import Element
from automerge.symmetry import Symmetry
from automerge.trace import normalise_args, prepared, trace


@dataclass(frozen=True)
class Verification:
    """What `verify` measured.

    Attributes:
        error: the largest difference of outputs, relative to the largest output.
        elements: how many random elements were tried, on one input each.
        inputs: how many inputs.
        reacted: False if the outputs did not change when the moved weights were perturbed, or hold nothing but rounding
            errors, so that nothing was checked.
        randomised: False if the model gave no finite output with randomised weights, so that its own were used.
        seconds: wall time.
    """

    error: float
    elements: int
    inputs: int
    randomised: bool
    seconds: float
    reacted: bool = True

    def __str__(self) -> str:
        if not self.reacted:
            return f"not verified: the outputs do not react to the weights that move, on {self.inputs} inputs"
        own = "" if self.randomised else ", with the model's own weights"
        return (
            f"verified: {self.elements} random elements on {self.inputs} inputs change the float64 output by at most "
            f"{self.error:.1e} (relative){own}, in {self.seconds:.1f} s"
        )


def relative_difference(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> float:
    """The largest relative difference; infinite where shapes, integers or non-finite entries disagree.

    Every entry is held against its own size, or against a small quantile of the tensor where it is smaller than that,
    so that masked (huge) entries do not hide the others.
    """
    worst = 0.0
    if len(a) != len(b):
        return float("inf")
    for x, y in zip(a, b, strict=True):
        if x.shape != y.shape:
            return float("inf")
        if not (x.is_floating_point() or x.is_complex()):
            worst = max(worst, 0.0 if torch.equal(x, y) else float("inf"))
            continue
        finite = torch.isfinite(x)
        if not torch.equal(finite, torch.isfinite(y)):
            return float("inf")
        x, y = x[finite], y[finite]
        if x.numel():
            size = x.abs()
            worst = max(worst, float(((x - y).abs() / size.clamp(min=_floor(size))).max()))
    return worst


def _floor(size: torch.Tensor) -> float:
    """The size below which an entry of a tensor counts as zero."""
    ordinary = size[(size > 0) & (size < 1e8)]
    if not ordinary.numel():
        return 1e-30
    some = ordinary[:: max(1, ordinary.numel() // 100_000)]
    return max(float(torch.quantile(some, 0.1)), 1e-4 * float(some.median()), 1e-30)


def _finite(outputs: Sequence[torch.Tensor]) -> bool:
    floats = [t for t in outputs if (t.is_floating_point() or t.is_complex()) and t.numel()]
    return all(bool(torch.isfinite(t).any()) for t in floats)


def verify(
    model: nn.Module,
    args: Any,
    symmetry: Symmetry,
    kwargs: Mapping[str, Any] | None = None,
    *,
    elements: int = 3,
    seed: int = 0,
    tolerance: float = 1e-9,
) -> Verification:
    """Check a symmetry on the model: random group elements must leave the float64 output unchanged.

    The weights and normalisation statistics are randomised first, because a fresh initialisation (zeros, ones, layer
    scales of 1e-6) hides mistakes. The elements take turns on the example and on a fresh input.

    Args:
        model: the model; it is copied, not changed.
        args: the example inputs, as for `infer`.
        symmetry: what to check.
        kwargs: keyword inputs.
        elements: how many random elements on each input, at least.
        seed: of weights, inputs and elements.
        tolerance: the largest relative difference that passes.

    Raises:
        InvarianceError: naming the first operator whose value differs.
        SymmetryError: if the symmetry is of another architecture.
    """
    start = time.perf_counter()
    positional, keywords = normalise_args(args, kwargs)
    subject = Subject(model)
    _check_fits(symmetry, subject.tensors, model)
    inputs: list[tuple[Any, Any]] = [(positional, keywords), fresh_inputs(positional, keywords, seed)]
    free = {n: t for n, t in subject.tensors.items() if symmetry.aliases.get(n, n) in symmetry.shapes}
    rest = {n: t.detach().clone() for n, t in subject.tensors.items() if n not in free}
    base = rest | _alias(randomised(free, symmetry.statistics, seed), symmetry)
    try:
        base = subject.calibrate(base, *inputs[0], fixed=rest)
        before = [subject.outputs(base, *i) for i in inputs]
        ok = all(_finite(o) for o in before)
    except Exception:
        ok = False
    if not ok:
        base = {n: t.detach().to(subject.tensors[n].dtype, copy=True) for n, t in named_tensors(model).items()}
        inputs = inputs[:1]
        try:
            before = [subject.outputs(base, *i) for i in inputs]
        except Exception as problem:
            raise TraceError(
                f"{type(model).__name__} does not run in float64, as verification needs ({type(problem).__name__}: "
                f"{problem}); pass verify=False to skip it"
            ) from problem
    worst, drowned, count = 0.0, False, 0
    for element in trial_elements(symmetry, elements * len(inputs), seed):
        turn, count = count % len(inputs), count + 1
        run, move = partial(subject.outputs, base, *inputs[turn]), partial(_moved, symmetry, element)
        error = relative_difference(before[turn], run(move))
        if not error <= tolerance:
            if not within_rounding(error, before[turn], run, relative_difference):
                raise _failure(model, subject, base, move, inputs[turn], error)
            drowned = True
        else:
            worst = max(worst, error)
    reacted = not count or (not drowned and _reacts(subject, base, symmetry, inputs, before))
    return Verification(worst, count, len(inputs), ok, time.perf_counter() - start, reacted)


def within_rounding(
    error: float,
    before: Sequence[torch.Tensor],
    run: Callable[[Change], list[torch.Tensor]],
    difference: Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], float],
    draws: int = 8,
) -> bool:
    """Whether changing every weight in its last digits changes the outputs about as much as ``error``.

    An output that cancels exactly (the sum of a normalisation over two channels) holds nothing but rounding errors, which
    depend on the order of summation: no permutation leaves them alone. A wrong group changes more than that by far.

    Args:
        error: a difference of outputs.
        before: the outputs under the weights as they are.
        run: the outputs under weights that are changed on the way.
        difference: how outputs are compared.
        draws: how many random changes, each about four units in the last place.
    """
    return any(error <= 32 * difference(before, run(partial(_jitter, 1e-15, seed))) for seed in range(draws))


def _jitter(size: float, seed: int, name: str, value: torch.Tensor) -> torch.Tensor:
    """A tensor whose entries change by about this share; the same for the same name and seed."""
    if value.is_complex():
        return torch.view_as_complex(_jitter(size, seed, name, torch.view_as_real(value.resolve_conj())))
    if not value.is_floating_point():
        return value
    rng = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    noise = torch.randn(value.shape, generator=rng, dtype=torch.float32)  # several times faster than in float64
    return value * noise.to(value.device, torch.float64).mul_(size).add_(1)


def _reacts(
    subject: Subject,
    base: Mapping[str, torch.Tensor],
    symmetry: Symmetry,
    inputs: Sequence[tuple[Any, Any]],
    before: Sequence[Any],
) -> bool:
    """Whether the outputs depend on what the group moves: a dead output would agree with any claim."""
    names = {s.param for g in symmetry.sets for s in g.slots}

    def perturbed(name: str, value: torch.Tensor) -> torch.Tensor:
        key = symmetry.aliases.get(name, name)
        return _jitter(1e-2, 1, key, value) if key in names else value

    for values, given in zip(before, inputs, strict=True):
        run = partial(subject.outputs, base, *given)
        change = relative_difference(values, run(perturbed))
        if change > 1e-8 and not within_rounding(change, values, run, relative_difference, 1):
            return True
    return False


def trial_elements(symmetry: Symmetry, count: int, seed: int) -> Iterator[Element]:
    """Elements that tell the generators apart: every one is moved, and of any two small ones one without the other.

    Large sets move by independent random cycles each time. A set of two or three units has hardly a choice, so two of them
    that may only move together would always do so, or by chance in every trial: each gets a binary code of its own, and
    moves in the trials where its code has a one.

    Args:
        symmetry: the group.
        count: at least so many elements; more where the codes need them. None if there are no generators.
        seed: of the codes and cycles.
    """
    rng = np.random.default_rng(seed)
    small = [i for i, g in enumerate(symmetry.sets) if g.size <= 3]
    bits = max(count, int(np.ceil(np.log2(len(small) + 1)))) if symmetry.sets else 0
    drawn: Any = rng.choice(2**bits - 1, size=len(small), replace=False) + 1 if small else ()
    codes = dict(zip(small, map(int, drawn), strict=True))
    for bit in range(bits):
        yield symmetry.element(
            [
                _cycle(g.size, rng) if codes.get(i, -1) >> bit & 1 else np.arange(g.size)
                for i, g in enumerate(symmetry.sets)
            ]
        )


def _cycle(n: int, rng: np.random.Generator) -> np.ndarray:
    """A random permutation that is one cycle, so that nothing stays."""
    order = rng.permutation(n)
    out = np.empty(n, np.int64)
    out[order] = np.roll(order, 1)
    return out


def _moved(symmetry: Symmetry, element: Element, name: str, value: torch.Tensor) -> torch.Tensor:
    return element.apply_to(symmetry.aliases.get(name, name), value)


def _alias(state: dict[str, torch.Tensor], symmetry: Symmetry) -> dict[str, torch.Tensor]:
    return {n: state[symmetry.aliases.get(n, n)] for n in state}


def _failure(
    model: nn.Module, subject: Subject, base: Any, move: Change, given: tuple[Any, Any], error: float
) -> Exception:
    where = "the output"
    graphs = []
    for change in (unchanged, move):
        subject.load(base, change)
        with torch.no_grad(), double_precision(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            graphs.append(trace(subject.model, map_tensors(widen, given[0]), map_tensors(widen, given[1])))
    held = _still_used(model, graphs[0])
    if held:
        return TraceError(
            f"a copy of the model still reads {held} of the original, from a hook or a function that holds on to it, so "
            "nothing can be verified (or merged) on copies; read the tensor from the module that the hook is called with"
        )
    for a, b in zip(graphs[0].graph.nodes, graphs[1].graph.nodes, strict=False):
        x, y = a.meta.get("val"), b.meta.get("val")
        if a.op != "call_function" or not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
            continue
        if _multiset_differs(x, y):
            module = f" in module {a.meta['module']!r}" if a.meta.get("module") else ""
            where = f"{a.target}{module} at {a.meta.get('source', '?')}"
            break
    return InvarianceError(
        f"a random element of the group changes the output by {error:.1e} (relative); the first operator whose values "
        f"differ is {where}"
    )


def _check_fits(symmetry: Symmetry, tensors: Mapping[str, torch.Tensor], model: nn.Module) -> None:
    """The symmetry is of this architecture."""
    for name, shape in symmetry.shapes.items():
        if name not in tensors or tuple(tensors[name].shape) != tuple(shape):
            found = f"has the shape {tuple(tensors[name].shape)}" if name in tensors else "does not exist"
            raise SymmetryError(
                f"the symmetry is of another architecture: its {name}, of the shape {tuple(shape)}, {found} in this "
                f"{type(model).__name__}; infer it again"
            )


def _still_used(model: nn.Module, graph: fx.GraphModule) -> str | None:
    """The name of one of a model's tensors that entered the trace of its copy as a constant."""
    constants = [c.double() for c in graph.buffers() if c.is_floating_point() and c.unique().numel() > 1]
    for name, tensor in model.state_dict().items():
        if any(c.shape == tensor.shape and torch.equal(c, tensor.detach().to(c)) for c in constants):
            return name
    return None


@torch.no_grad()
def _multiset_differs(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether two tensors differ by more than a permutation of their entries."""
    if x.shape != y.shape:
        return True
    if x.is_complex():
        x, y = torch.view_as_real(x), torch.view_as_real(y)
    a, b = x.double().flatten().sort().values, y.double().flatten().sort().values
    a, b = torch.nan_to_num(a, posinf=0.0, neginf=0.0), torch.nan_to_num(b, posinf=0.0, neginf=0.0)
    return bool((a - b).abs().max() > 1e-8 * (a.abs().max() + 1e-30)) if a.numel() else False


def check_replay(model: nn.Module, args: Any, kwargs: Any, graph: fx.GraphModule) -> str | None:
    """A note if the recorded graph and the model disagree on fresh inputs: the path depended on data."""
    positional, keywords = normalise_args(args, kwargs)
    given = fresh_inputs(positional, keywords, 1)
    info = graph.meta["trace"]
    if info.rewritten:
        return f"the forward pass writes to {', '.join(info.rewritten[:3])}; the trace holds for their present values"
    if any("rand" in str(n.target) or "bernoulli" in str(n.target) for n in graph.graph.nodes):
        return "the forward pass draws random numbers; the groups hold for any fixed draw"
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    try:
        with torch.no_grad(), prepared(model):
            fed = [t.clone() for t in tensors_of_in_order(given)]
            replayed = graph(*(tensors[n].detach().clone() for n in info.names.values()), *fed)
            expected = tensors_of(model(*given[0], **given[1]))
        same = relative_difference([t.double() for t in expected], [t.double() for t in replayed]) < 1e-2
    except Exception as error:
        return (
            f"the recorded graph does not replay on other inputs ({type(error).__name__}); the groups hold for its path"
        )
    if same:
        return None
    return "on other inputs the model takes another path than the recorded one; the groups hold for the recorded path"


def tensors_of_in_order(given: tuple[Any, Any]) -> list[torch.Tensor]:
    """The input tensors in the order in which `trace` makes placeholders."""
    found: list[torch.Tensor] = []
    map_tensors(lambda _, t: found.append(t) or t, given[0])  # type: ignore[func-returns-value]
    map_tensors(lambda _, t: found.append(t) or t, given[1])  # type: ignore[func-returns-value]
    return found

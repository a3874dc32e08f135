"""Sums of products: matrix products, convolutions, bilinear forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from automerge.rules._axes import Unruled
from automerge.rules._engine import Engine
from automerge.rules._registry import Context, rule
from automerge.rules._value import Value, common_refinement, copy_letters, new_letter, plain, refine_axis, rename


def pair_axes(engine: Engine, a: Value, i: int, b: Value, j: int) -> tuple[Value, Value]:
    """Give axis i of ``a`` and axis j of ``b`` (of one length, or one of them broadcast) the same letters."""
    if not a.axes[i] or not b.axes[j]:
        return a, b
    sizes = common_refinement([a.size[c] for c in a.axes[i]], [b.size[c] for c in b.axes[j]])
    if sizes is None:
        a, b = engine.merge_axis(a, i)[0], engine.merge_axis(b, j)[0]
    else:
        a, b = refine_axis(a, i, sizes), refine_axis(b, j, sizes)
    return a, rename(b, dict(zip(b.axes[j], a.axes[i], strict=True)))


def batched(engine: Engine, a: Value, b: Value) -> Value:
    """``(*batch, m, k) @ (*batch, k, n)`` with equal (or broadcast) batch axes."""
    b = copy_letters(b)
    a, b = pair_axes(engine, a, len(a.axes) - 1, b, len(b.axes) - 2)
    lead: list[tuple[int, ...]] = []
    for k in range(len(a.axes) - 2):
        a, b = pair_axes(engine, a, k, b, k)
        lead.append(a.axes[k] or b.axes[k])
    batch = {c for axis in lead for c in axis}
    return engine.contract(a, b, (*lead, a.axes[-2], b.axes[-1]), batch & set(a.size) & set(b.size))


@rule("mm", "bmm", "_int_mm")
def mm(context: Context, a: Value, b: Value, *_: Any, **__: Any) -> Value:
    return batched(context.engine, a, b)


@rule("matmul")
def matmul(context: Context, a: Value, b: Value) -> Value:
    vector_a, vector_b = len(a.axes) == 1, len(b.axes) == 1
    a = a.with_axes(((), *a.axes)) if vector_a else a
    b = b.with_axes((*b.axes, ())) if vector_b else b
    n = max(len(a.axes), len(b.axes))
    a = a.with_axes(((),) * (n - len(a.axes)) + a.axes)
    b = b.with_axes(((),) * (n - len(b.axes)) + b.axes)
    out = batched(context.engine, a, b)
    return context.engine.reshape(out, context.shape)


@rule("addmm", "baddbmm", "addmv", "addbmm", "_addmm_activation", "_sparse_addmm")
def addmm(context: Context, c: Value, a: Value, b: Value, *, beta: Any = 1, **_: Any) -> Value:
    added = [] if beta == 0 else [c]  # with zero the first operand is not read at all
    if len(b.axes) == 1:
        return context.engine.elementwise([*added, mv(context, a, b)])
    product = batched(context.engine, a, b)
    if len(product.axes) > len(context.shape):
        product = context.engine.reduce(product, set(product.axes[0]))
        product = product.with_axes(product.axes[1:])
    return context.engine.elementwise([*added, product])


@rule("mv")
def mv(context: Context, a: Value, b: Value) -> Value:
    b = copy_letters(b)
    a, b = pair_axes(context.engine, a, 1, b, 0)
    return context.engine.contract(a, b, (a.axes[0],), set())


@rule("dot", "vdot")
def dot(context: Context, a: Value, b: Value) -> Value:
    b = copy_letters(b)
    a, b = pair_axes(context.engine, a, 0, b, 0)
    return context.engine.contract(a, b, (), set())


@rule("inner")
def inner(context: Context, a: Value, b: Value) -> Value:
    if not a.axes or not b.axes:
        return context.engine.elementwise([a, b])
    b = copy_letters(b)
    a, b = pair_axes(context.engine, a, len(a.axes) - 1, b, len(b.axes) - 1)
    return context.engine.contract(a, b, (*a.axes[:-1], *b.axes[:-1]), set())


@rule("linear")
def linear(context: Context, x: Value, w: Value, bias: Value | None = None) -> Value:
    w = copy_letters(w)
    x, w = pair_axes(context.engine, x, len(x.axes) - 1, w, len(w.axes) - 1)
    out = context.engine.contract(x, w, (*x.axes[:-1], *w.axes[:-1]), set())
    return out if bias is None else context.engine.elementwise([out, bias])


@rule("_cdist_forward", "_euclidean_dist", "cdist")
def distances(context: Context, a: Value, b: Value, *_: Any) -> Value:
    """Distances between rows: a contraction over their entries."""
    n = max(len(a.axes), len(b.axes))
    a = a.with_axes(((),) * (n - len(a.axes)) + a.axes)
    b = b.with_axes(((),) * (n - len(b.axes)) + b.axes)
    b = b.with_axes((*b.axes[:-2], b.axes[-1], b.axes[-2]))
    return batched(context.engine, a, b)


@rule("_pdist_forward")
def pair_distances(context: Context, x: Value, *_: Any) -> Value:
    """Distances of every row from the rows behind it: which pair each is of tells the order of the rows."""
    rows = set(x.axes[0])
    whole = context.engine.pin_letters(x, rows, "distances of each row from those behind it")
    rest = context.engine.reduce(whole, {*rows, *x.axes[1]})
    return context.engine.elementwise([rest.with_axes(((),)), plain(context.shape, pinned=True)])


def _matrix(x: Value) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The letters of the rows and of the columns, each of which moves on its own."""
    rows, columns = x.axes[-2], x.axes[-1]
    if any(set(f.letters) & set(rows) and set(f.letters) & set(columns) for f in x.factors):
        raise Unruled("a matrix whose rows have orders of their own")
    return rows, columns


@rule("_linalg_slogdet")
def slogdet(context: Context, x: Value) -> tuple[Value | None, ...]:
    """The size of a determinant does not depend on the order of rows and of columns; its sign does, if they differ."""
    if not context.used <= {0, 1}:
        raise Unruled("the factors of a determinant")
    size = _of_all(context.engine, x if context.used <= {1} else _tied(context.engine, x))
    return size, size, None, None


@rule("_linalg_det")
def determinant(context: Context, x: Value) -> tuple[Value | None, ...]:
    """det(P A P^-1) = det(A)."""
    if not context.used <= {0}:
        raise Unruled("the factors of a determinant")
    return _of_all(context.engine, _tied(context.engine, x)), None, None


def _of_all(engine: Engine, x: Value) -> Value:
    """A number of every matrix, in which the order of rows and of columns does not count."""
    rows, columns = _matrix(x)
    size = engine.reduce(x, {*rows, *columns})
    return size.with_axes(size.axes[:-2])


def _tied(engine: Engine, x: Value) -> Value:
    """Matrices whose rows and columns move together."""
    _matrix(x)
    order = (*range(len(x.axes) - 2), len(x.axes) - 1, len(x.axes) - 2)
    return engine.elementwise([x, copy_letters(x.with_axes(x.axes[k] for k in order))])


@rule("linalg_inv_ex")
def inverse(context: Context, x: Value, *_: Any, **__: Any) -> tuple[Value, Value]:
    return _inverted(context.engine, x), plain(tuple(context.out(1).shape))


def _inverted(engine: Engine, x: Value) -> Value:
    """(P A Q)^-1 = Q^-1 A^-1 P^-1."""
    rows, columns = _matrix(x)
    both = engine.reduce(x, {*rows, *columns})  # every entry depends on all
    mixed = Value((*x.axes[:-2], columns, rows), x.size, list(x.factors), set(x.pinned), chosen=x.chosen)
    return engine.elementwise([mixed, both])


@rule("linalg_pinv")
def pseudoinverse(context: Context, x: Value, *_: Any, **__: Any) -> Value:
    return _inverted(context.engine, x)


@rule("linalg_lstsq")
def least_squares(context: Context, a: Value, b: Value, *_: Any, **__: Any) -> tuple[Value | None, ...]:
    """The shortest solution: the pseudoinverse of A times B."""
    if not context.used <= {0}:
        raise Unruled("what is beside a solution")
    return batched(context.engine, _inverted(context.engine, a), b), None, None, None


@rule("_linalg_solve_ex")
def solve(context: Context, a: Value, b: Value, *, left: bool = True, **_: Any) -> tuple[Value | None, ...]:
    """A^-1 B, or B A^-1."""
    if not context.used <= {0}:
        raise Unruled("the factors of a solution")
    vector = len(b.axes) == len(a.axes) - 1
    b = b.with_axes((*b.axes, ())) if vector else b
    inverted = _inverted(context.engine, a)
    out = batched(context.engine, inverted, b) if left else batched(context.engine, b, inverted)
    return context.engine.reshape(out, tuple(context.out(0).shape)), None, None, None


@rule("_linalg_svd")
def singular_values(context: Context, x: Value, *_: Any, **__: Any) -> tuple[Value | None, ...]:
    """Those of P A Q are those of A; its vectors have signs by chance."""
    if not context.used <= {1}:
        raise Unruled("singular vectors")
    rows, columns = _matrix(x)
    size = context.engine.reduce(x, {*rows, *columns})
    ranked = plain([context.out(1).shape[-1]], pinned=True)
    return None, context.engine.elementwise([size.with_axes((*size.axes[:-2], ())), ranked]), None


@rule("linalg_matrix_exp")
def matrix_exp(context: Context, x: Value) -> Value:
    """exp(P A P^-1) = P exp(A) P^-1, so rows and columns must move together."""
    engine, tied = context.engine, _tied(context.engine, x)
    return engine.elementwise([tied, engine.reduce(tied, {*tied.axes[-2], *tied.axes[-1]})])


@rule("linalg_solve_triangular", "cholesky_solve")
def triangular_solve(context: Context, a: Value, b: Value, *_: Any, left: bool = True, **__: Any) -> Value:
    """A^-1 B, or B A^-1, for a matrix of which the order of rows and columns is what makes it triangular."""
    engine = context.engine
    a, b = (b, a) if "cholesky" in context.node.target._schema.name else (a, b)
    inverted = _inverted(engine, engine.pin_letters(a, {*a.axes[-2], *a.axes[-1]}, "a triangular matrix"))
    return batched(engine, inverted, b) if left else batched(engine, b, inverted)


@rule("linalg_cholesky_ex", "linalg_qr", "_linalg_eigh", "linalg_lu_factor_ex")
def factored(context: Context, x: Value, *_: Any, **__: Any) -> tuple[Value | None, ...]:
    """Factors of matrices, which depend on the order of rows and columns; whatever is before these two axes stays."""
    engine = context.engine
    gone = {*x.axes[-2], *x.axes[-1]}
    rest = engine.reduce(engine.pin_letters(x, gone, "a factored matrix"), gone)
    lead = rest.axes[:-2]
    out: list[Value | None] = []
    for i in range(len(context.node.meta["val"])):
        own = tuple(context.out(i).shape[len(lead) :])
        stretched = rest.with_axes((*lead, *((),) * len(own)))
        out.append(engine.elementwise([stretched, plain(own, pinned=True)]) if i in context.used else None)
    return tuple(out)


@rule("_grouped_mm")
def grouped_mm(context: Context, a: Value, b: Value, offsets: Value | None = None, *_: Any, **__: Any) -> Value:
    """Rows sorted by expert, each group times its expert's matrix: every row reads the matrix that the offsets give it.

    Which rows are whose depends on data, so the experts are pinned; inside each, the units have their own order.
    """
    if len(a.axes) != 2 or len(b.axes) != 3 or offsets is None:
        raise Unruled("a grouped product with another layout")
    engine = context.engine
    a = engine.pin_letters(a, set(a.axes[0]), "rows sorted by data")
    b, letter = engine.merge_axis(copy_letters(b), 0)
    if letter is not None:
        b = engine.fix_letter(b, letter, "experts chosen by data")
    rows = a.axes[0]
    if letter is None or not rows:
        b = b.with_axes(((), *b.axes[1:]))
    else:
        choice = engine.choice(offsets)
        b = rename(b, {letter: choice})
        size = b.size | {c: a.size[c] for c in rows}
        b = Value((rows, *b.axes[1:]), size, b.factors, b.pinned | set(rows), chosen={choice: rows})
    a, b = pair_axes(engine, a, 1, b, 1)
    return engine.contract(a, b, (rows, b.axes[2]), set())


@rule("_trilinear")
def trilinear(
    context: Context, a: Value, b: Value, c: Value, ea: Any, eb: Any, ec: Any, sums: Sequence[int], unroll: int = 1
) -> Value:
    values = []
    for v, extra in ((a, ea), (b, eb), (c, ec)):
        wide = list(v.axes)
        for k in sorted(extra):
            wide.insert(k, ())
        values.append(v.with_axes(tuple(wide)))
    product = context.engine.elementwise(values)
    gone = {letter for k in sums for letter in product.axes[k]}
    reduced = context.engine.reduce(product, gone)
    axes = tuple(axis for k, axis in enumerate(reduced.axes) if k not in set(sums))
    return reduced.with_axes(axes)


@rule("convolution", "_convolution", "cudnn_convolution", "mkldnn_convolution", "convolution_overrideable")
def convolution(
    context: Context,
    x: Value,
    w: Value,
    bias: Value | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool = False,
    output_padding: Sequence[int] = (0,),
    groups: int = 1,
    *_: Any,
) -> Value:
    if not isinstance(transposed, bool):
        raise Unruled("a convolution with another signature")
    size = tuple(context.node.meta["val"].shape)
    out = convolved(context.engine, x, w, (stride, padding, dilation, transposed, output_padding, groups), size)
    if bias is not None:
        out = context.engine.elementwise([out, bias.with_axes((*bias.axes, *((),) * (len(w.axes) - 2)))])
    return context.engine.reshape(out, context.shape)


def convolved(engine: Engine, x: Value, w: Value, options: Sequence[Any], size: Sequence[int]) -> Value:
    """The convolution itself, to a given size of the output."""
    stride, padding, dilation, transposed, output_padding, groups = options
    w = copy_letters(w)
    n = len(w.axes) - 2
    x = x.with_axes(((),) * (n + 2 - len(x.axes)) + x.axes)  # an unbatched input
    whole = [  # a kernel over all of an axis is a product with it (words in a text, whose features are an axis of an image)
        not transposed and _at(dilation, k) == 1 and _at(padding, k) == 0 and w.shape[k + 2] == x.shape[k + 2] > 1
        for k in range(n)
    ]
    mixing = [not _pointwise(w.shape[k + 2], _at(stride, k), _at(padding, k), _at(output_padding, k)) for k in range(n)]
    for k in range(n):
        if mixing[k] and not whole[k]:
            x = engine.pin_letters(x, set(x.axes[k + 2]), "spatial axis of a convolution")
        if not whole[k]:
            w = engine.pin_letters(w, set(w.axes[k + 2]), "position in a convolution kernel")
        else:
            places = set(w.axes[k + 2])
            engine.kernels += [
                (f, places & set(f.letters), engine.axes.where) for f in w.factors if places & set(f.letters)
            ]
    b, c, *space = x.shape
    x = engine.reshape(x, [b, groups, c // groups, *space])
    o, i, *kernel = w.shape
    w = engine.reshape(w, [groups, o // groups, i, *kernel])
    inner, outer = (1, 2) if transposed else (2, 1)
    x, w = pair_axes(engine, x, 1, w, 0)
    x, w = pair_axes(engine, x, 2, w, inner)
    for k in range(n):
        if whole[k]:
            x, w = pair_axes(engine, x, 3 + k, w, 3 + k)
    group = x.axes[1] or w.axes[0]
    left = [() if whole[k] else x.axes[3 + k] for k in range(n)]
    out = engine.contract(x, w, (x.axes[0], group + w.axes[outer], *left), set(group) & set(x.size) & set(w.size))
    out = engine.reshape(out, [b, groups * w.shape[outer], *(1 if whole[k] else space[k] for k in range(n))])
    for k in range(n):
        if mixing[k] and not whole[k]:
            out = repinned(engine, out, k + 2, size[k - n])
    return out


@rule("convolution_backward")
def convolution_backward(
    context: Context, g: Value, x: Value, w: Value, _: Any, *options: Any
) -> tuple[Value | None, Value | None, Value | None]:
    """What a network that computes gradients itself (an energy, a score) does with those of its convolutions."""
    engine = context.engine
    stride, padding, dilation, transposed, output_padding, groups, _ = options
    others = [k for k in range(len(g.axes)) if k != 1]
    back = bias = weight = None
    if 0 in context.used:
        turned = (stride, padding, dilation, not transposed, output_padding, groups)
        back = engine.reshape(convolved(engine, g, w, turned, x.shape), x.shape)
    if 1 in context.used:
        kernel = plain(w.shape[2:], pinned=True)
        single = [_pointwise(m, _at(stride, k), _at(padding, k), 0) for k, m in enumerate(w.shape[2:])]
        x, g = (
            engine.pin_letters(
                v, {c for k, a in enumerate(v.axes[2:]) for c in a if not single[k]}, "spatial axis of a convolution"
            )
            for v in (x, g)
        )
        one, two = (
            engine.reshape(v, [v.shape[0], groups, v.shape[1] // groups, *v.shape[2:]])
            for v in ((x, copy_letters(g)) if transposed else (g, copy_letters(x)))
        )
        for k in (0, 1, *(3 + k for k, alone in enumerate(single) if alone)):
            one, two = pair_axes(engine, one, k, two, k)
        group = set(one.axes[1]) & set(two.axes[1])
        product = engine.contract(one, two, ((one.axes[1] or two.axes[1]) + one.axes[2], two.axes[2]), group)
        weight = engine.elementwise([product.with_axes((*product.axes, *((),) * len(kernel.axes))), kernel])
    if 2 in context.used:
        lone = {c for k in others for c in g.axes[k]}
        bias = engine.reduce(g, lone)
        bias = bias.with_axes((bias.axes[1],))
    return back, weight, bias


def _at(values: Sequence[int], k: int) -> int:
    return values[k] if len(values) > k else values[0]


def _pointwise(kernel: int, stride: int, padding: Any, output_padding: int) -> bool:
    return kernel == 1 and stride == 1 and padding == 0 and output_padding == 0


def repinned(engine: Engine, value: Value, axis: int, length: int) -> Value:
    """Replace an axis whose positions were mixed by a pinned axis of another length."""
    gone = set(value.axes[axis])
    value = engine.reduce(value, gone)
    letters: tuple[int, ...] = ()
    size, pinned = dict(value.size), set(value.pinned)
    if length > 1:
        letters = (new_letter(),)
        size[letters[0]] = int(length)
        pinned.add(letters[0])
    axes = tuple(letters if k == axis else a for k, a in enumerate(value.axes))
    return Value(axes, size, value.factors, pinned)

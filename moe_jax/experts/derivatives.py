"""Functions with a hand-written gradient that every transformation of JAX accepts, to any order.

``jax.custom_vjp`` gives a function a gradient and takes its forward mode away: ``jvp``, ``linearize``,
``jacfwd`` and second derivatives fail. A function here is one JAX primitive with the rules

* *jvp*: the tangents are a second function, linear in them. It runs as the ``jax.jvp`` of the function.
* *transpose*: the hand-written gradient. It is a function of the same kind, so it has these rules too.
* *batching*: ``jax.vmap`` of everything a function consists of.

A loop whose trip count is known only at run time has a forward derivative but no reverse one. So a
function also has a ``reference``: the same values in operations that JAX differentiates in both modes,
regardless of cost. Only the reverse derivative of a derivative uses it (``grad`` of ``grad``,
``grad`` of ``jvp``); ``grad``, ``jvp``, ``jvp`` of ``grad`` and ``jacfwd`` do not.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from moe_jax.experts.implementation import vary_over, varying_axes

_Flat = Sequence[Any]


class DifferentiableFunction(Protocol):
    """A function of pytrees with its derivatives, for ``call``.

    ``in_place`` may run operations that have no derivative, such as ``to_bits``. It is False wherever
    JAX differentiates what the method does.
    """

    @property
    def batched_in_a_loop(self) -> bool:
        """Whether ``jax.vmap`` runs one element of the batch after another."""
        ...

    @property
    def run(self) -> Callable[..., Any]:
        """``(*arguments, in_place) -> values``."""
        ...

    @property
    def forward(self) -> Callable[..., tuple[Any, Any]]:
        """``(*arguments, in_place) -> (values, what backward needs beside the arguments)``."""
        ...

    @property
    def backward(self) -> Callable[..., tuple[Any, ...]]:
        """``(arguments, residuals, cotangents, in_place) -> cotangents``, with None for what has no
        derivative."""
        ...

    @property
    def reference(self) -> Callable[..., tuple[Any, Any]]:
        """``(*arguments)``: ``forward`` in operations that JAX differentiates in both modes."""
        ...


def call(function: DifferentiableFunction, *arguments: Any) -> Any:
    """Returns ``function.run(*arguments, in_place=True)``, differentiable to any order.

    Args:
        function: static; it must not close over traced arrays that are to be differentiated.
        arguments: pytrees of arrays. Integer arrays have no derivative.
    """
    flat, tree = jax.tree.flatten(arguments)
    # A primitive takes and returns flat lists. Tracing fills in the structure of what it returns.
    structures: dict[str, Any] = {}  # of outputs and residuals, as soon as they were traced
    outputs = _bind(_program(function, tree, structures), flat)
    return jax.tree.unflatten(structures["outputs"], outputs)


@dataclasses.dataclass(frozen=True, eq=False)
class _Reverse:
    """The hand-written gradient of a program."""

    forward: _Program  # arguments -> outputs, residuals
    backward: Callable[..., list[Any]]  # (arguments, residuals, cotangents) -> one each argument


@dataclasses.dataclass(frozen=True, eq=False)
class _Program:
    """A function of a flat list of arrays, in the forms that the rules need."""

    run: Callable[..., list[Any]]
    smooth: Callable[..., list[Any]]  # the same with a forward derivative
    reference: Callable[..., list[Any]]  # the same with both derivatives
    reverse: _Reverse | None = None
    linear: tuple[bool, ...] = ()  # which arguments the outputs are linear in
    # (other arguments, cotangents) -> cotangents of the linear ones; None transposes ``reference``.
    transpose: Callable[..., list[Any]] | None = None
    transpose_smooth: Callable[..., list[Any]] | None = None
    loop: bool = False  # whether a batch runs one element after another


def _program(function: DifferentiableFunction, tree: Any, structures: dict[str, Any]) -> _Program:
    """The program of a function whose arguments have the structure ``tree``."""
    size = tree.num_leaves

    def run(*arrays: Any, in_place: bool) -> list[Any]:
        outputs = function.run(*jax.tree.unflatten(tree, arrays), in_place=in_place)
        structures["outputs"] = jax.tree.structure(outputs)
        return jax.tree.leaves(outputs)

    def forward(*arrays: Any, in_place: bool) -> list[Any]:
        both = function.forward(*jax.tree.unflatten(tree, arrays), in_place=in_place)
        structures["residuals"] = jax.tree.structure(both[1])
        return jax.tree.leaves(both)

    def reference(*arrays: Any) -> list[Any]:
        return jax.tree.leaves(function.reference(*jax.tree.unflatten(tree, arrays)))

    def backward(*arrays: Any, in_place: bool) -> list[Any]:
        outputs, residuals = structures["outputs"], structures["residuals"]
        arguments = jax.tree.unflatten(tree, arrays[:size])
        results = function.backward(
            arguments,
            jax.tree.unflatten(residuals, arrays[size : -outputs.num_leaves]),
            jax.tree.unflatten(outputs, arrays[-outputs.num_leaves :]),
            in_place=in_place,
        )
        leaves: list[Any] = []
        for argument, result in zip(arguments, results, strict=True):
            count = len(jax.tree.leaves(argument))
            # None also stands for a single array without a derivative.
            some = jax.tree.leaves(result, is_leaf=lambda leaf: leaf is None)
            leaves += [None] * count if result is None else some
        return leaves

    return _Program(
        run=functools.partial(run, in_place=True),
        smooth=functools.partial(run, in_place=False),
        reference=lambda *a: reference(*a)[: structures["outputs"].num_leaves],
        reverse=_Reverse(
            _Program(
                run=functools.partial(forward, in_place=True),
                smooth=functools.partial(forward, in_place=False),
                reference=reference,
                loop=function.batched_in_a_loop,
            ),
            backward,
        ),
        loop=function.batched_in_a_loop,
    )


# --- the primitive ------------------------------------------------------------------------------

_call_p = Primitive("moe_jax_call")
_call_p.multiple_results = True


def _bind(program: _Program, arguments: _Flat) -> list[Any]:
    # Inside `shard_map` the sum over devices that a gradient needs is the transpose of this cast.
    arguments = vary_over(list(arguments), sorted(varying_axes(list(arguments))))
    # Traced at once, as a primitive has to know the shapes of its results.
    jaxpr: ClosedJaxpr = jax.make_jaxpr(program.run)(*arguments)
    return _call_p.bind(*arguments, program=program, jaxpr=jaxpr)


def _evaluate(*arguments: Any, program: _Program, jaxpr: ClosedJaxpr) -> list[Any]:
    del program
    return jaxpr_as_fun(jaxpr)(*arguments)


_call_p.def_impl(_evaluate)
_call_p.def_abstract_eval(lambda *_, program, jaxpr: jaxpr.out_avals)
mlir.register_lowering(_call_p, mlir.lower_fun(_evaluate, multiple_results=True))


def _is_float(value: Any) -> bool:
    return jnp.issubdtype(value.dtype, jnp.inexact)


def _jvp_rule(
    primals: _Flat, tangents: _Flat, *, program: _Program, jaxpr: ClosedJaxpr
) -> tuple[list[Any], list[Any]]:
    # Arguments without a tangent, such as the integers of a plan, are skipped.
    moving = [not isinstance(t, ad.Zero) for t in tangents]
    count = len(jaxpr.out_avals)
    residuals: list[Any] = []
    # A program without a hand-written reverse keeps no residuals.
    if program.reverse is None:
        outputs = _call_p.bind(*primals, program=program, jaxpr=jaxpr)
    else:
        both = _bind(program.reverse.forward, primals)
        outputs, residuals = both[:count], both[count:]
    floats = [_is_float(o) for o in outputs]
    parts: list[list[Any]] = []
    # A function that is linear in an argument is its own derivative by it, with its own transpose.
    linear = [
        m and lin for m, lin in zip(moving, program.linear or [False] * len(moving), strict=True)
    ]
    if any(linear):
        mixed = [
            (t if moves else jnp.zeros_like(p)) if is_linear else p
            for p, t, moves, is_linear in zip(
                primals, tangents, moving, program.linear, strict=True
            )
        ]
        parts.append([o for o, f in zip(_bind(program, mixed), floats, strict=True) if f])
    # The linear arguments are done. The other moving arguments need the derivative at the primals.
    moving = [m and not lin for m, lin in zip(moving, linear, strict=True)]
    if any(moving):
        shapes = [jax.ShapeDtypeStruct(o.shape, o.dtype) for o in outputs]
        derivative = _derivative(program, moving, shapes, len(residuals))
        moved = [t for t, m in zip(tangents, moving, strict=True) if m]
        parts.append(_bind(derivative, [*residuals, *primals, *moved]))
    # The total derivative is the sum over the arguments that move.
    sums = [functools.reduce(jnp.add, terms) for terms in zip(*parts, strict=True)]
    values = iter(sums)
    zeros = [ad.Zero(jax.typeof(o).to_tangent_aval()) for o in outputs]
    return list(outputs), [next(values) if f else z for f, z in zip(floats, zeros, strict=True)]


def _derivative(program: _Program, moving: list[bool], outputs: list[Any], kept: int) -> _Program:
    """(residuals, arguments, tangents of the moving arguments) -> tangents of the float outputs."""
    size, floats = len(moving), [_is_float(o) for o in outputs]

    def tangents(method: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
        def run(*arrays: Any) -> list[Any]:
            arguments, moved = list(arrays[kept : kept + size]), arrays[kept + size :]

            def of_moving(*chosen: Any) -> list[Any]:
                values = iter(chosen)
                all_of = [next(values) if m else a for m, a in zip(moving, arguments, strict=True)]
                return [o for o, f in zip(method(*all_of), floats, strict=True) if f]

            points = [a for a, m in zip(arguments, moving, strict=True) if m]
            return jax.jvp(of_moving, points, list(moved))[1]

        return run

    def transpose(in_place: bool) -> Callable[..., list[Any]]:
        def run(*arrays: Any) -> list[Any]:
            assert program.reverse is not None
            residuals, arguments = arrays[:kept], arrays[kept : kept + size]
            # Integer outputs have no cotangent. The hand-written gradient expects one for every
            # output.
            given = iter(arrays[kept + size :])
            cotangents = [
                next(given) if f else jnp.zeros(o.shape, o.dtype)
                for o, f in zip(outputs, floats, strict=True)
            ]
            results = program.reverse.backward(
                *arguments, *residuals, *cotangents, in_place=in_place
            )
            return [
                jnp.zeros_like(a) if r is None else r
                for a, r, m in zip(arguments, results, moving, strict=True)
                if m
            ]

        return run

    run = tangents(program.smooth)
    return _Program(
        run=run,
        smooth=run,
        reference=tangents(program.reference),
        linear=(*[False] * (kept + size), *[True] * sum(moving)),
        transpose=transpose(True) if program.reverse else None,
        transpose_smooth=transpose(False) if program.reverse else None,
        loop=program.loop,
    )


def _transpose_rule(
    cotangents: _Flat, *arguments: Any, program: _Program, jaxpr: ClosedJaxpr
) -> list[Any]:
    # JAX transposes by the arguments that it marks as undefined. They must be among the linear
    # ones.
    unknown = [ad.is_undefined_primal(a) for a in arguments]
    assert not any(u and not lin for u, lin in zip(unknown, program.linear, strict=True))
    fixed = [a for a, u in zip(arguments, unknown, strict=True) if not u]
    given = [ad.instantiate_zeros(ct) if isinstance(ct, ad.Zero) else ct for ct in cotangents]
    shapes = [a.aval for a in arguments if ad.is_undefined_primal(a)]

    def full(chosen: _Flat, others: _Flat) -> list[Any]:
        linear, rest = iter(chosen), iter(others)
        return [next(linear) if u else next(rest) for u in unknown]

    def by_reference(*arrays: Any) -> list[Any]:
        others, cts = arrays[: len(fixed)], arrays[len(fixed) :]
        axes = sorted(varying_axes(list(arrays)))
        # A linear function has the same transpose at every point, so `jax.vjp` is taken at zeros.
        zeros = vary_over([jnp.zeros(s.shape, s.dtype) for s in shapes], axes)
        pull = jax.vjp(lambda *chosen: program.reference(*full(chosen, others)), *zeros)[1]
        return list(pull(list(cts)))

    def forward(method: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
        return lambda *arrays: method(*full(arrays[len(fixed) :], arrays[: len(fixed)]))

    # The hand-written transpose takes all linear arguments at once.
    written = program.transpose if unknown == list(program.linear) else None
    smooth = program.transpose_smooth if written else None
    # The transpose of the transpose is the function itself, so derivatives of any order stay in
    # this file.
    transposed = _Program(
        run=written or by_reference,
        smooth=smooth or by_reference,
        reference=by_reference,
        linear=(*[False] * len(fixed), *[True] * len(given)),
        transpose=forward(program.run),
        transpose_smooth=forward(program.smooth),
        loop=program.loop,
    )
    results = iter(_bind(transposed, [*fixed, *given]))
    return [next(results) if u else None for u in unknown]


def _batch_rule(
    axis: Any, arguments: _Flat, dims: _Flat, *, program: _Program, jaxpr: ClosedJaxpr
) -> tuple[list[Any], list[Any]]:
    batched = [d is not None for d in dims]
    if not any(batched):
        outputs = _call_p.bind(*arguments, program=program, jaxpr=jaxpr)
        return outputs, [None] * len(outputs)
    # Batch axes move to the front, so that one program serves every position of the axis.
    front = [
        a if d is None else jnp.moveaxis(a, d, 0) for a, d in zip(arguments, dims, strict=True)
    ]
    outputs = _bind(_batched(program, batched, axis), front)
    return outputs, [0] * len(outputs)


def _batched(program: _Program, batched: list[bool], axis: Any) -> _Program:
    """The program with a leading batch axis on the arguments that are ``batched`` and on outputs."""
    options: Any = {
        "axis_size": axis.size,
        "axis_name": axis.name,
        "spmd_axis_name": axis.spmd_name,
    }
    if axis.spmd_name is None:
        options.pop("spmd_axis_name")
    if not isinstance(axis.name, str):
        options.pop("axis_name")

    def over(method: Callable[..., list[Any]], kinds: Sequence[bool]) -> Callable[..., list[Any]]:
        # Some operations have no batched form, such as `ragged_dot` with different group sizes.
        if program.loop:
            return functools.partial(_map, method, kinds)
        in_axes = [0 if b else None for b in kinds]
        return lambda *a: jax.vmap(method, in_axes=tuple(in_axes), out_axes=0, **options)(*a)

    def gradient(
        method: Callable[..., list[Any]], fixed: Sequence[bool], wanted: Sequence[bool]
    ) -> Callable[..., list[Any]]:
        """``method`` of (fixed arguments, batched arrays); an argument that all share gets the sum."""

        def run(*arrays: Any) -> list[Any]:
            kinds = [*fixed, *[True] * (len(arrays) - len(fixed))]
            results = over(method, kinds)(*arrays)
            return [
                r if b or r is None else r.sum(axis=0) for r, b in zip(results, wanted, strict=True)
            ]

        return run

    reverse, transpose, transpose_smooth = program.reverse, None, None
    if reverse is not None:
        backward = reverse.backward

        def all_backward(*arrays: Any, in_place: bool) -> list[Any]:
            run = functools.partial(backward, in_place=in_place)
            return gradient(run, batched, batched)(*arrays)

        reverse = _Reverse(_batched(reverse.forward, batched, axis), all_backward)
    if program.transpose is not None and program.transpose_smooth is not None:
        fixed = [b for b, lin in zip(batched, program.linear, strict=True) if not lin]
        wanted = [b for b, lin in zip(batched, program.linear, strict=True) if lin]
        transpose = gradient(program.transpose, fixed, wanted)
        transpose_smooth = gradient(program.transpose_smooth, fixed, wanted)
    return _Program(
        run=over(program.run, batched),
        smooth=over(program.smooth, batched),
        reference=over(program.reference, batched),
        reverse=reverse,
        linear=program.linear,
        transpose=transpose,
        transpose_smooth=transpose_smooth,
        loop=program.loop,
    )


def _map(method: Callable[..., list[Any]], batched: Sequence[bool], *arrays: Any) -> list[Any]:
    """``jax.vmap`` over the leading axes of the ``batched`` arrays, as a loop."""

    def one(chosen: list[Any]) -> list[Any]:
        values = iter(chosen)
        return method(*[next(values) if b else a for a, b in zip(arrays, batched, strict=True)])

    return jax.lax.map(one, [a for a, b in zip(arrays, batched, strict=True) if b])


ad.primitive_jvps[_call_p] = _jvp_rule
ad.primitive_transposes[_call_p] = _transpose_rule
batching.fancy_primitive_batchers[_call_p] = _batch_rule

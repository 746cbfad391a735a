"""Training of the small language model, and trained models on disk.

The model itself is in ``moe_jax.lab.language_model``. The text is the Python standard library's own
source, see ``moe_jax.lab.data``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from moe_jax import checkpoint
from moe_jax.lab.data import Batches, Corpus, load_corpus
from moe_jax.lab.language_model import LMConfig, init, init_states, loss
from moe_jax.parallel.distributed import agreed, gathered, global_array
from moe_jax.parallel.sharding import (
    Mesh,
    NamedSharding,
    P,
    jit_sharded,
    param_specs,
    shard,
    token_spec,
)
from moe_jax.routers import Router
from moe_jax.types import Array, Params, pytree

# --- training -------------------------------------------------------------------------------


PARTS = ("router", "experts", "rest")


def part_of(path: Sequence[Any]) -> str:
    """Which of ``PARTS`` the parameter at this path of a tree belongs to, by the names on its way.

    Takes the paths of ``jax.tree_util`` in trees of dicts and in those of Flax modules.

    Example:
        >>> tree = {"moe": {"router": {"kernel": 1.0}, "experts": {"up": 2.0}}, "qkv": 3.0}
        >>> jax.tree_util.tree_map_with_path(lambda path, leaf: part_of(path), tree)
        {'moe': {'experts': {'up': 'experts'}, 'router': {'kernel': 'router'}}, 'qkv': 'rest'}
    """
    names = [_name(step) for step in path]
    return next((part for part in ("router", "experts") if part in names), "rest")


def _name(step: Any) -> str:
    return str(getattr(step, "key", getattr(step, "name", getattr(step, "idx", step))))


def optimizer(config: LMConfig, steps: int) -> optax.GradientTransformation:
    """AdamW with warm-up and cosine, and clipped gradients; routers and experts have their own rate
    and weight decay (``optax.partition``).

    For the trees of ``moe_jax.lab.language_model`` as well as for ``nnx.Optimizer(decoder, ...)``.
    """
    warmup = max(1, round(config.warmup * steps))
    factors = {"router": config.router_rate, "experts": config.expert_rate, "rest": 1.0}
    decays = {"router": config.router_decay, "experts": config.expert_decay, "rest": None}

    def adamw(part: str) -> optax.GradientTransformation:
        peak = config.learning_rate * factors[part]
        decay = config.weight_decay if decays[part] is None else decays[part]
        return optax.adamw(
            optax.warmup_cosine_decay_schedule(
                0.0, peak, warmup, max(steps, warmup + 1), peak / 10
            ),
            b1=0.9, b2=0.98, weight_decay=decay, mask=_decayed,
        )  # fmt: skip

    def labels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, leaf: part_of(path), params)

    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.partition({part: adamw(part) for part in PARTS}, labels),
    )


def _decayed(params: Any) -> Any:
    # By name: stacked layers give the scales of norms a second axis.
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: not any(_name(step).endswith("norm") for step in path), params
    )


@pytree
class TrainState:
    """All that a training step changes."""

    params: Params
    router_states: tuple[Any, ...]  # one a layer with experts
    optimizer_state: Any
    step: Array  # i32[]


@functools.partial(jax.jit, static_argnames=("config", "steps"))
def init_training(config: LMConfig, steps: int, seed: int | Array) -> TrainState:
    """The state before the first of ``steps`` steps."""
    params = init(config, jax.random.key(seed))
    with jax.numpy_dtype_promotion("standard"):
        optimizer_state = optimizer(config, steps).init(params)
    return TrainState(
        params=params,
        router_states=init_states(config),
        optimizer_state=optimizer_state,
        step=jnp.zeros((), jnp.int32),
    )


@functools.partial(jax.jit, static_argnames=("config", "steps", "mesh"), donate_argnames="state")
def train_step(
    config: LMConfig, steps: int, state: TrainState, tokens: Array, mesh: Mesh | None = None
) -> tuple[TrainState, dict[str, Array]]:
    """One step on tokens i32[B, S + 1]. ``state`` is donated: use the returned one."""
    value = functools.partial(loss, config, mesh=mesh)
    gradient = jax.value_and_grad(
        lambda p: value(p, states=state.router_states, tokens=tokens), has_aux=True
    )
    (_, (router_states, metrics)), grads = gradient(state.params)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes int32 counts with float32 rates
        updates, optimizer_state = optimizer(config, steps).update(
            grads, state.optimizer_state, state.params
        )
        params = optax.apply_updates(state.params, updates)
    return TrainState(
        params=params,
        router_states=router_states,
        optimizer_state=optimizer_state,
        step=state.step + 1,
    ), metrics


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Place:
    """Where training runs: on the default device, or over a mesh, maybe of several processes."""

    config: LMConfig
    steps: int
    mesh: Mesh | None

    @functools.cached_property
    def _specs(self) -> Any:
        assert self.mesh is not None
        shapes = jax.eval_shape(functools.partial(init_training, self.config, self.steps, 0))
        return param_specs(shapes, self.mesh)

    def start(self, seed: int) -> TrainState:
        start = functools.partial(init_training, self.config, self.steps)
        if self.mesh is None:
            return start(seed)
        made = jit_sharded(lambda s: start(s), self.mesh, in_specs=None, out_specs=self._specs)
        return made(np.int32(seed))

    def put(self, state: TrainState) -> TrainState:
        return state if self.mesh is None else shard(state, self.mesh, self._specs)

    @functools.cached_property
    def step(self) -> Callable[[TrainState, np.ndarray], tuple[TrainState, dict[str, Array]]]:
        if self.mesh is None:
            return lambda state, tokens: train_step(
                self.config, self.steps, state, jnp.asarray(tokens)
            )
        mesh, rows = self.mesh, token_spec(self.mesh)
        step = jit_sharded(
            lambda state, tokens: train_step(self.config, self.steps, state, tokens, mesh),
            mesh,
            in_specs=(self._specs, rows),
            out_specs=(self._specs, P()),
            donate_argnums=0,
        )
        return lambda state, tokens: step(state, global_array(tokens, NamedSharding(mesh, rows)))


PathLike = str | os.PathLike[str]
LayerRouters = tuple[Router, ...]


def train(
    config: LMConfig,
    out: PathLike,
    steps: int,
    seed: int = 0,
    progress: Progress | bool = True,
    *,
    console: Console | None = None,
    resume: PathLike | None = None,
    until: int | None = None,
    overwrite: bool = False,
    corpus: Corpus | None = None,
    mesh: Mesh | None = None,
    save_every: int | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Trains on the standard library's source and saves a checkpoint.

    Every batch is a function of the seed and the step, so a run that was stopped and resumed ends
    with the same numbers as one that was not.

    Args:
        config: the model.
        out: the checkpoint's folder, see ``moe_jax.checkpoint``. It holds the parameters, routers
            and states named ``layer_0`` ..., the optimizer's state, and metadata: ``model``,
            ``training`` (with its history) and ``data``.
        steps: steps of the whole schedule.
        seed: of the parameters and the batches.
        progress: a bar of its own (True), none (False), or a ``rich`` one to add a task to.
        console: where a bar of its own is drawn; None is standard error.
        resume: a checkpoint of this function to go on from.
        until: stop and save after so many steps of the schedule; None goes on to the end.
        overwrite: whether a checkpoint at ``out`` is replaced.
        corpus: the text; None is ``load_corpus()``.
        mesh: the devices, maybe of several processes
            (``moe_jax.parallel.distributed.process_group``), each of which calls this alike,
            feeds its devices' share of the batch and sees the same results. Process 0 saves.
        save_every: also save after every so many steps, each time in place of the last.

    Returns:
        The checkpoint's folder, and what its metadata says of the training: ``steps``, ``seed``,
        ``step``, ``history`` (metrics of some steps) and ``seconds``.

    Raises:
        ValueError: steps that make no sense, or a checkpoint made with other settings.
        FloatingPointError: the loss is no longer a number.
        CheckpointError, DataError: ``out`` is taken, or there is no text.

    Example:
        >>> import tempfile
        >>> tiny = LMConfig(num_layers=1, d_model=16, num_heads=2, num_experts=4, k=2, d_ff=8,
        ...                 length=16, batch_size=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path, _ = train(tiny, f"{folder}/model", 2, progress=False)
        ...     load_model(path).config == tiny
        True
    """
    until = steps if until is None else until
    if not 1 <= until <= steps:
        raise ValueError(
            f"steps, until: expected 1 <= until <= steps, got until={until}, steps={steps}. "
            "steps is the length of the whole schedule."
        )
    _check_place(out, overwrite)
    corpus = load_corpus() if corpus is None else corpus
    text = corpus.describe()
    place = _Place(config=config, steps=steps, mesh=mesh)
    state, history, spent = place.start(seed), [], 0.0
    wanted = {"steps": steps, "seed": seed}
    if resume is not None:
        state, before = _resume(resume, config, wanted, state, str(text["fingerprint"]))
        state = place.put(state)
        history, spent = list(before["history"]), float(before["seconds"])
    batches = Batches(corpus.train, batch_size=config.batch_size, length=config.length, seed=seed)
    started = time.perf_counter()
    every = max(1, steps // 50)
    first = int(state.step)

    def save(step: int, overwrite: bool) -> tuple[Path, dict[str, Any]]:
        told = {
            **wanted, "step": step, "history": list(history),
            "seconds": spent + time.perf_counter() - started,
        }  # fmt: skip
        whole = gathered(state)
        model = Model(
            config=config,
            params=whole.params,
            routers=(config.router(),) * config.num_moe_layers,
            states=whole.router_states,
            metadata={"training": told, "data": text},
        )
        error = None
        if jax.process_index() == 0:
            try:
                extra = {"optimizer": whole.optimizer_state}
                save_model(out, model, extra=extra, overwrite=overwrite)
            except checkpoint.CheckpointError as problem:
                error = problem
        agreed(error)
        return Path(out).resolve(), told

    with track(progress, "train", until, first, console=console) as advance:
        for step in range(first, until):
            state, metrics = place.step(state, batches[step])
            note = ""
            if (step + 1) % every == 0 or step + 1 == until:
                now = {name: float(value) for name, value in jax.device_get(metrics).items()}
                if not math.isfinite(now["bits_per_byte"]):
                    raise FloatingPointError(
                        f"train: expected a finite loss, got {now['bits_per_byte']} at step "
                        f"{step + 1}. Lower learning_rate."
                    )
                history.append({"step": step + 1, **now})
                note = f"{now['bits_per_byte']:.2f} bits/byte"
            advance(note)
            if save_every and (step + 1) % save_every == 0 and step + 1 < until:
                save(step + 1, overwrite)
                overwrite = True
    return save(until, overwrite)


def _check_place(out: PathLike, overwrite: bool) -> None:
    """Before the work: whether process 0, which alone writes, will be able to save."""
    error = None
    if jax.process_index() == 0:
        try:
            checkpoint.check_free(out, overwrite)
        except checkpoint.CheckpointError as problem:
            error = problem
    agreed(error)


def _resume(
    path: PathLike, config: LMConfig, wanted: dict[str, int], state: TrainState, text: str
) -> tuple[TrainState, dict[str, Any]]:
    saved = checkpoint.restore(
        path,
        expected=checkpoint.Checkpoint(
            params=state.params, extra={"optimizer": state.optimizer_state}
        ),
    )
    training = saved.metadata["training"]
    had = {
        "model": LMConfig.from_json(saved.metadata["model"]).to_json(),
        "data": saved.metadata["data"]["fingerprint"],
        **{name: training[name] for name in wanted},
    }  # fmt: skip
    now = {"model": config.to_json(), "data": text, **wanted}
    if had != now:
        names = ", ".join(f"{n}={had[n]!r}" for n in now if had[n] != now[n])
        raise ValueError(
            f"resume: expected a checkpoint of the same run, got one with {names}. "
            "Give the same model, steps, seed and text, or train anew."
        )
    states = tuple(saved.states[f"layer_{i}"] for i in range(config.num_moe_layers))
    return TrainState(
        params=saved.params,
        router_states=states,
        optimizer_state=saved.extra["optimizer"],
        step=jnp.asarray(training["step"], jnp.int32),
    ), training


# --- models on disk -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """A trained model with a rule and its state for every layer that has experts."""

    config: LMConfig
    params: dict[str, Params]
    routers: LayerRouters
    states: tuple[Any, ...]
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)


Variants = Mapping[str, tuple[LayerRouters, tuple[Any, ...]]]


def save_model(
    path: PathLike,
    model: Model,
    *,
    variants: Variants | None = None,
    extra: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Saves a model, and any further sets of routers and states for the same parameters.

    Layer i's rule is named ``layer_i``, that of a variant ``NAME/layer_i``.
    """
    routers, states = {}, {}
    for name, (rules, values) in {"": (model.routers, model.states), **(variants or {})}.items():
        for i, (rule, value) in enumerate(zip(rules, values, strict=True)):
            routers[_layer_name(name, i)] = rule
            states[_layer_name(name, i)] = value
    metadata = {**model.metadata, "model": model.config.to_json(), "variants": [*(variants or {})]}
    layers = {
        _layer_name(name, i): checkpoint.LayerSpec(
            router=("layers", "moe", "router"),
            layer=("layers", "moe"),
            experts=model.config.experts,
            index=i,
        )
        for name in ("", *(variants or {}))
        for i in range(model.config.num_moe_layers)
    }
    content = checkpoint.Checkpoint(
        params=model.params,
        routers=routers,
        states=states,
        layers=layers,
        metadata=metadata,
        extra=extra or {},
    )
    return checkpoint.save(path, content, overwrite=overwrite)


def load_model(path: PathLike, variant: str = "") -> Model:
    """Restores what ``train`` or ``calibrate`` saved, or one of its variants.

    Raises:
        ValueError: no such variant, or a checkpoint of something else.
        CheckpointError: see ``moe_jax.checkpoint.restore``.
    """
    return load_variants(path, [variant])[variant]


def load_variants(path: PathLike, names: Sequence[str] | None = None) -> dict[str, Model]:
    """The model of a checkpoint under each of these variants; None is all, ``""`` the model itself.

    The parameters are read once and shared.
    """
    saved = checkpoint.restore(path)
    if "model" not in saved.metadata:
        raise ValueError(
            f"{path}: expected a language model saved by moe_jax.lab.training, got a checkpoint "
            "without one. Restore it by moe_jax.checkpoint.restore instead."
        )
    config = LMConfig.from_json(saved.metadata["model"])
    known = ["", *saved.metadata["variants"]]
    names = known if names is None else names
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"variant: expected one of {', '.join(known[1:]) or 'none'}, got {unknown[0]!r}. "
            "Leave it out for the model itself."
        )
    layers = range(config.num_moe_layers)
    return {
        name: Model(
            config=config,
            params=saved.params,
            routers=tuple(saved.routers[_layer_name(name, i)] for i in layers),
            states=tuple(saved.states[_layer_name(name, i)] for i in layers),
            metadata=saved.metadata,
        )
        for name in names
    }


def _layer_name(variant: str, layer: int) -> str:
    return f"{variant}/layer_{layer}" if variant else f"layer_{layer}"


# --- progress -------------------------------------------------------------------------------


def progress_bar(console: Console | None = None) -> Progress:
    """A bar that shows what is done, how far, for how long and how much longer; on stderr."""
    return Progress(
        TextColumn("[bold]{task.description:<9}"),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
        console=console or Console(stderr=True),
    )


@contextlib.contextmanager
def track(
    progress: Progress | bool,
    description: str,
    total: int,
    done: int = 0,
    *,
    console: Console | None = None,
) -> Iterator[Callable[[str], None]]:
    """A task on a bar; yields what to call, with a note or "", after each of ``total`` steps."""
    if progress is False:
        yield lambda note: None
        return
    bar = progress_bar(console) if progress is True else progress
    task = bar.add_task(description, total=total, completed=done, note="")

    def advance(note: str) -> None:
        if note:
            bar.update(task, note=note)
        bar.advance(task)

    with bar if progress is True else contextlib.nullcontext():
        yield advance

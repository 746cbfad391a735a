"""Training of the small language model of ``moe_jax.lab.language_model``.

The text is the Python standard library's own source, see ``moe_jax.lab.data``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import Progress

from moe_jax import checkpoint
from moe_jax.checkpoint.sealed import PathLike
from moe_jax.lab.data import Batches, Corpus, load_corpus
from moe_jax.lab.language_model import init, init_states, loss
from moe_jax.lab.lm_config import LMConfig
from moe_jax.lab.model_files import Model, save_model
from moe_jax.lab.optimizer import optimizer
from moe_jax.lab.progress import track
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
from moe_jax.routers import with_share
from moe_jax.types import Array, Params, pytree


@pytree
class TrainState:
    """Everything that a training step changes."""

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
    """Takes one step on tokens i32[B, S + 1]. ``state`` is donated: use the returned one."""
    share = None if config.schedule is None else config.schedule.share_at(state.step, steps)
    value = functools.partial(loss, config, mesh=mesh, share=share)
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
class _Placement:
    """The devices of a run: the default device, or a mesh, perhaps of several processes."""

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
        sharded = jit_sharded(lambda s: start(s), self.mesh, in_specs=None, out_specs=self._specs)
        return sharded(np.int32(seed))

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
        ...     checkpoint.load_metadata(path)["metadata"]["training"]["step"]
        2
    """
    until = steps if until is None else until
    if not 1 <= until <= steps:
        raise ValueError(
            f"steps, until: expected 1 <= until <= steps, got until={until}, steps={steps}. "
            "steps is the length of the whole schedule."
        )
    _check_place(out, overwrite)
    wanted = {"steps": steps, "seed": seed}
    if resume is not None:
        before = checkpoint.load_metadata(resume)
        if "extra-optimizer" not in before["arrays"]:
            raise ValueError(_NO_TRAINING.format(what="one without the state of the optimizer"))
        _check_resumable(before["metadata"], config, wanted)
    corpus = load_corpus() if corpus is None else corpus
    text = corpus.describe()
    placement = _Placement(config=config, steps=steps, mesh=mesh)
    state, history, spent = placement.start(seed), [], 0.0
    if resume is not None:
        state, before = _resume(resume, config, wanted, state, str(text["fingerprint"]))
        state = placement.put(state)
        history, spent = list(before["history"]), float(before["seconds"])
    batches = Batches(corpus.train, batch_size=config.batch_size, length=config.length, seed=seed)
    started = time.perf_counter()
    # About 50 points of history: reading the metrics of a step waits for the device.
    every = max(1, steps // 50)
    first = int(state.step)

    def save(step: int, overwrite: bool) -> tuple[Path, dict[str, Any]]:
        summary = {
            **wanted,
            "step": step,
            "history": list(history),
            "seconds": spent + time.perf_counter() - started,
        }
        whole = gathered(state)
        model = Model(
            config=config,
            params=whole.params,
            routers=(config.router(),) * config.num_moe_layers,
            # What is saved is served: every token gets its full budget until a rule is fitted.
            states=with_share(whole.router_states, 0.0),
            metadata={"training": summary, "data": text},
        )
        error = None
        if jax.process_index() == 0:
            try:
                extra = {"optimizer": whole.optimizer_state}
                save_model(out, model, extra=extra, overwrite=overwrite)
            except checkpoint.CheckpointError as problem:
                error = problem
        agreed(error)
        return Path(out).resolve(), summary

    with track(progress, "train", until, first, console=console) as advance:
        for step in range(first, until):
            state, metrics = placement.step(state, batches[step])
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
    """Raises CheckpointError, before the work, if process 0 (which alone writes) could not save."""
    error = None
    if jax.process_index() == 0:
        try:
            checkpoint.check_free(out, overwrite)
        except checkpoint.CheckpointError as problem:
            error = problem
    agreed(error)


_NO_TRAINING = (
    "resume: expected a checkpoint of moe-jax train, got {what}. Give the folder that train wrote, or "
    "leave it out."
)


def _check_resumable(
    metadata: Mapping[str, Any], config: LMConfig, wanted: dict[str, int], text: str | None = None
) -> None:
    """Raises ValueError for a checkpoint of another run; a text of None is not compared."""
    if not {"model", "training", "data"} <= metadata.keys():
        raise ValueError(_NO_TRAINING.format(what="another"))
    had = {
        "model": LMConfig.from_json(metadata["model"]).to_json(),
        "data": metadata["data"]["fingerprint"],
        **{name: metadata["training"][name] for name in wanted},
    }
    now = {"model": config.to_json(), "data": had["data"] if text is None else text, **wanted}
    if had != now:
        names = ", ".join(f"{n}={had[n]!r}" for n in now if had[n] != now[n])
        raise ValueError(
            f"resume: expected a checkpoint of the same run, got one with {names}. "
            "Give the same model, steps, seed and text, or train anew."
        )


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
    _check_resumable(saved.metadata, config, wanted, text)
    states = tuple(saved.states[f"layer_{i}"] for i in range(config.num_moe_layers))
    return TrainState(
        params=saved.params,
        router_states=states,
        optimizer_state=saved.extra["optimizer"],
        step=jnp.asarray(training["step"], jnp.int32),
    ), training

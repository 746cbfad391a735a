"""The content of a checkpoint, and the seal of its folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from moe_jax.checkpoint.layers import LayerSpec
from moe_jax.checkpoint.sealed import LIBRARY, Seal
from moe_jax.checkpoint.tree import CheckpointError
from moe_jax.config import Config
from moe_jax.routers import Router
from moe_jax.types import Params

FORMAT = 1
SEAL = Seal(
    noun="a checkpoint",
    manifest="manifest.json",
    mark=("library", LIBRARY),
    format=FORMAT,
    error=CheckpointError,
    absent=f"Either this is no {LIBRARY} checkpoint, or it was copied or saved only in part: copy it "
    "again, or save it again.",
    renew="Restore a copy from your backup, or save it again.",
)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """The values that are saved and restored together.

    Args:
        params: any pytree of arrays; restored without an example if its containers are dicts with
            text keys, lists, tuples and None.
        routers: the rules by name, e.g. one a layer.
        states: the router states by the same names, each shaped like ``router.init_state()``.
        layers: what the routers belong to: where in ``params`` their parameters are, and which
            experts they feed. Routers that are left out are looked for by name when restored.
        config: the configuration that belongs to the routers.
        metadata: values that JSON can hold: provenance, measurements, step counts.
        extra: further pytrees by name, e.g. ``{"optimizer": opt_state}``. They are restored only
            on request, see ``restore``.

    Example:
        >>> import jax
        >>> from moe_jax.routers import TopK
        >>> router = TopK(num_experts=4, k=2)
        >>> saved = Checkpoint(
        ...     params={"router": router.init(jax.random.key(0), 16)},
        ...     routers={"router": router},
        ...     states={"router": router.init_state()},
        ... )
    """

    params: Params = None
    routers: Mapping[str, Router] = dataclasses.field(default_factory=dict)
    states: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    layers: Mapping[str, LayerSpec] = dataclasses.field(default_factory=dict)
    config: Config | None = None
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

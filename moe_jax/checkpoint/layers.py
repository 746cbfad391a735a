"""The layers of a checkpoint: where the parameters of its routers are, and which experts they feed.

A checkpoint stores one ``LayerSpec`` for each router that was described when it was saved.
``locate_layers`` derives the others from the names in the tree: checkpoints of version 0.1 hold no
specs.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from moe_jax.checkpoint.tree import CheckpointError
from moe_jax.experts import FeedForward
from moe_jax.routers import RandomSkip, Router
from moe_jax.types import ExpertChoice, Params, Routing

Keys = tuple[str, ...]
# The layers of one model: layer_3, or RULE/layer_3 where a checkpoint has several rules.
_LAYER_NAME = re.compile(r"(?:(.+)/)?layer_(0|[1-9][0-9]*)")


def natural_order(name: str) -> list[Any]:
    """Returns a key that sorts numbers in names by value.

    Example:
        >>> sorted(["layer_10", "layer_9", "a/layer_2"], key=natural_order)
        ['a/layer_2', 'layer_9', 'layer_10']
    """
    # Text and numbers alternate, so keys never compare one with the other.
    return [int(part) if i % 2 else part for i, part in enumerate(re.split("([0-9]+)", name))]


def rule_of(name: str) -> str | None:
    """Returns the rule of ``RULE/layer_3``, "" for ``layer_3``, and None for any other name."""
    match = _LAYER_NAME.fullmatch(name)
    return None if match is None else match[1] or ""


def own_rule(metadata: Mapping[str, Any]) -> str | None:
    """Returns the name of the rule of ``layer_0`` ..., which ``moe-jax calibrate`` was given first.

    Example:
        >>> own_rule({"calibration": {"rules": ["min_p", "top_p"]}})
        'min_p'
    """
    calibration = metadata.get("calibration")
    rules = calibration.get("rules") if isinstance(calibration, Mapping) else None
    return str(rules[0]) if isinstance(rules, list) and rules else None


def layers_of_rule(routers: Iterable[str], rule: str) -> list[str]:
    """Returns the routers of a rule, "" for the model's own, in the order of their layers.

    Example:
        >>> layers_of_rule(["min_p/layer_10", "layer_2", "min_p/layer_2"], "min_p")
        ['min_p/layer_2', 'min_p/layer_10']
    """
    return sorted((name for name in routers if rule_of(name) == rule), key=natural_order)


def default_router(routers: Mapping[str, Router]) -> str:
    """Returns the router that a checkpoint stands for where none is named.

    Routers without the prefix of a further rule (``min_p-20/layer_0``) are the model's own and come
    first, then rules that are no control (``RandomSkip``). Among these it is the first layer.

    Args:
        routers: at least one router.

    Example:
        >>> from moe_jax.routers import TopK
        >>> rule, control = TopK(num_experts=4, k=2), RandomSkip(num_experts=4, k=2, mean_k=1.5)
        >>> default_router({"drop/layer_0": control, "layer_10": rule, "layer_9": rule})
        'layer_9'
        >>> default_router({"drop/layer_0": control, "top_p/layer_0": rule})
        'top_p/layer_0'
    """

    def order(name: str) -> tuple[bool, bool, list[Any]]:
        return bool(rule_of(name)), isinstance(routers[name], RandomSkip), natural_order(name)

    return min(routers, key=order)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """The place of a router's parameters in the tree of a checkpoint, and the experts it feeds.

    Args:
        router: keys from the root of ``params`` to the router's parameters.
        layer: keys to the parameters of ``moe_layer`` (``experts``, and ``shared`` if there is a
            shared expert). None where the checkpoint holds no experts for this router.
        experts: what one expert computes. None where ``layer`` is None.
        index: position along the leading axis of every array at these keys, for layers that are
            stacked. None where the arrays belong to this layer alone.

    Example:
        >>> spec = LayerSpec(router=("moe", "router"), layer=("moe",), experts=FeedForward())
        >>> LayerSpec.from_json(spec.to_json()) == spec
        True
    """

    router: Keys
    layer: Keys | None = None
    experts: FeedForward | None = None
    index: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns every field as a plain JSON value."""
        return {
            "router": list(self.router),
            "layer": None if self.layer is None else list(self.layer),
            "experts": None if self.experts is None else dataclasses.asdict(self.experts),
            "index": self.index,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> LayerSpec:
        """Returns the spec that ``to_json`` wrote."""
        layer, experts = data["layer"], data["experts"]
        return LayerSpec(
            router=tuple(data["router"]),
            layer=None if layer is None else tuple(layer),
            experts=None if experts is None else FeedForward(**experts),
            index=data["index"],
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StoredLayer:
    """A router with everything it needs to run.

    Attributes:
        name: the router's name in the checkpoint.
        router: the rule.
        state: its state.
        params: its parameters; ``kernel`` is f32[D, E] for most rules.
        layer: parameters of ``moe_layer``; its ``router`` is ``params``. None without experts.
        experts: what one expert computes; None without experts.
    """

    name: str
    router: Router
    state: Any
    params: Params
    layer: dict[str, Params] | None
    experts: FeedForward | None

    @property
    def width(self) -> int:
        """D, the width of the hidden states that the router takes."""
        # A router of several layers (`DepthRouter`) reads the hidden states with its first one.
        return int(self.params["down" if "down" in self.params else "kernel"].shape[0])

    def route(self, x: Any) -> Routing | ExpertChoice:
        """Routes hidden states float[T, D]."""
        return self.router(self.params, self.state, x)


def stored_layer(
    name: str, router: Router, state: Any, params: Params, spec: LayerSpec
) -> StoredLayer:
    """Takes the arrays that a spec points at out of ``params``, the tree of the checkpoint.

    Raises:
        CheckpointError: the tree has nothing at these keys.
    """
    router_params = _take(name, params, spec.router, spec.index)
    layer = None
    if spec.layer is not None and spec.experts is not None:
        layer = {**_take(name, params, spec.layer, spec.index), "router": router_params}
    return StoredLayer(
        name=name,
        router=router,
        state=state,
        params=router_params,
        layer=layer,
        experts=None if layer is None else spec.experts,
    )


def check_specs(
    layers: Mapping[str, LayerSpec], routers: Mapping[str, Router], params: Any
) -> None:
    """Checks that each spec has the name of a router and that its keys lead to arrays.

    ``params`` may hold arrays or their shapes.

    Raises:
        CheckpointError: a spec fails the check; the message names it.
    """
    for name, spec in layers.items():
        if name not in routers:
            raise CheckpointError(
                f"layers: expected names of routers ({', '.join(routers) or 'none'}), got {name!r}. "
                "Give the layer the name of its router."
            )
        if (spec.layer is None) != (spec.experts is None):
            raise CheckpointError(
                f"layers[{name!r}]: expected both of layer and experts or neither, got "
                f"layer={spec.layer}, experts={spec.experts}. layer says where the "
                "parameters are, experts what they compute."
            )
        router = _node(name, params, spec.router)
        if "kernel" not in router:
            raise CheckpointError(
                f"layers[{name!r}]: expected a router's parameters at {_path(spec.router)}, got "
                f"{', '.join(map(str, router)) or 'nothing'}. Point at the mapping that has 'kernel'."
            )
        trees = [router]
        if spec.layer is not None:
            trees.append(_node(name, params, spec.layer))
            if "experts" not in trees[-1]:
                raise CheckpointError(
                    f"layers[{name!r}]: expected the parameters of moe_layer at {_path(spec.layer)}, "
                    f"got {', '.join(map(str, trees[-1])) or 'nothing'}. Point at the mapping that "
                    "has 'experts'."
                )
        if spec.index is not None:
            sizes = {leaf.shape[:1] for leaf in jax.tree.leaves(trees)}
            # A scalar has no leading axis: the appended 0 makes every index too large for it.
            if len(sizes) != 1 or not spec.index < (*next(iter(sizes)), 0)[0]:
                raise CheckpointError(
                    f"layers[{name!r}]: expected arrays with a leading axis above index {spec.index}, "
                    f"got leading axes {sorted(sizes)}. Leave index out where layers are not stacked."
                )


def locate_layers(
    routers: Mapping[str, Router], params: Any, metadata: Mapping[str, Any]
) -> dict[str, LayerSpec]:
    """Returns a spec for every router whose parameters can be recognised by their names.

    Two layouts are tried in order: the stacked layers of a language model that ``moe-jax train`` of
    version 0.1 saved, then the first mapping with the router's name that holds a ``kernel``.
    """
    specs = {}
    for name in routers:
        spec = _stacked_spec(name, params, metadata) or _named_spec(name, params, metadata)
        if spec is not None:
            specs[name] = spec
    return specs


def _stacked_spec(name: str, params: Any, metadata: Mapping[str, Any]) -> LayerSpec | None:
    """The spec of ``layer_3`` or ``VARIANT/layer_3`` in ``params["layers"]["moe"]``.

    Version 0.1 marked these checkpoints by ``metadata["model"]`` alone. Their experts are always
    squared ReLUs, which is not in the metadata.
    """
    number = name.rsplit("/", 1)[-1].removeprefix("layer_")
    if "model" not in metadata or not number.isdigit():
        return None
    try:
        kernel = params["layers"]["moe"]["router"]["kernel"]
        has_experts = "experts" in params["layers"]["moe"]
    except (KeyError, TypeError, IndexError):
        return None
    if not has_experts or not int(number) < kernel.shape[0]:
        return None
    return LayerSpec(
        router=("layers", "moe", "router"),
        layer=("layers", "moe"),
        experts=FeedForward(activation="relu2"),
        index=int(number),
    )


def _named_spec(name: str, params: Any, metadata: Mapping[str, Any]) -> LayerSpec | None:
    """The spec of a router whose parameters are under its name.

    A checkpoint of version 0.1 describes its experts in ``metadata["experts"]``. The spec includes
    them if ``params[name]`` (or ``params``, if it has no such name) holds ``experts``.
    """
    keys = _find_kernel(params, name)
    if keys is None:
        return None
    settings = metadata.get("experts")
    layer: Keys = (name,) if name in params else ()
    tree = params.get(name, params)
    if not isinstance(settings, dict) or not isinstance(tree, dict) or "experts" not in tree:
        return LayerSpec(router=keys)
    try:
        experts = FeedForward(**settings)
    except (TypeError, ValueError):  # users write metadata: "experts" may mean something else
        return LayerSpec(router=keys)
    return LayerSpec(router=keys, layer=layer, experts=experts)


def _find_kernel(params: Any, name: str) -> Keys | None:
    """Keys of the first mapping called ``name`` that holds a ``kernel``, in it or in its router."""
    if not isinstance(params, dict):
        return None
    if name in params:
        keys, node = (name,), params[name]
        # The kernel is in the mapping itself, in its "router", or in the "router" of its "moe".
        while isinstance(node, dict):
            if "kernel" in node:
                return keys
            step = "router" if "router" in node else "moe"
            keys, node = (*keys, step), node.get(step)
    for key, value in params.items():
        deeper = _find_kernel(value, name)
        if deeper is not None:
            return (key, *deeper)
    return None


def _node(name: str, params: Any, keys: Keys) -> Any:
    node = params
    for key in keys:
        if not isinstance(node, Mapping) or key not in node:
            raise CheckpointError(
                f"layers[{name!r}]: expected params to have {_path(keys)}, got nothing at {key!r}. "
                "Give the keys from the root of params, in order."
            )
        node = node[key]
    if not isinstance(node, Mapping):
        raise CheckpointError(
            f"layers[{name!r}]: expected a mapping at {_path(keys)}, got a {type(node).__name__}. "
            "Point at the mapping that holds the arrays."
        )
    return node


def _take(name: str, params: Any, keys: Keys, index: int | None) -> dict[str, Any]:
    node = dict(_node(name, params, keys))
    return node if index is None else jax.tree.map(lambda leaf: leaf[index], node)


def _path(keys: Keys) -> str:
    return "params" + "".join(f"[{key!r}]" for key in keys)

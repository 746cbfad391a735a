"""Restoring: every file is verified before a single array is read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from moe_jax.checkpoint.arrays import read_arrays
from moe_jax.checkpoint.content import SEAL, Checkpoint
from moe_jax.checkpoint.layers import (
    LayerSpec,
    StoredLayer,
    default_router,
    layers_of_rule,
    locate_layers,
    natural_order,
    own_rule,
    rule_of,
    stored_layer,
)
from moe_jax.checkpoint.sealed import LIBRARY, PathLike, checksum_of, listed
from moe_jax.checkpoint.tree import (
    CheckpointError,
    check_against,
    difference_between,
    leaf_table,
    rebuilt_tree,
    shaped_like,
)
from moe_jax.config import Config, ConfigError
from moe_jax.routers import Router, router_from_json


def restore(path: PathLike, *, expected: Checkpoint | None = None) -> Checkpoint:
    """Reads a checkpoint, every array bit for bit as it was saved, on the default device.

    Router states come back as their own types, with the dtypes and shapes of
    ``router.init_state()``.

    Args:
        path: the folder.
        expected: an example of what the caller can use; arrays in it may be
            ``jax.ShapeDtypeStruct``. ``routers``, if any, must be equal to the stored ones.
            ``params``, if not None, must have the same names, shapes and dtypes, and gives the
            containers (needed where these are more than dicts, lists, tuples and None).
            ``extra`` names the extras to restore and gives their containers; extras that it does
            not name stay on disk. The other fields are not looked at.

    Raises:
        CheckpointError: there is no checkpoint, it is incomplete, damaged or changed, a newer
            format, or not what was expected. Nothing of it is returned then.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> from moe_jax.checkpoint import save
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save(f"{folder}/one", Checkpoint(params={}, extra={"m": (jnp.ones(2), None)}))
        ...     wish = Checkpoint(extra={"m": (jax.ShapeDtypeStruct((2,), jnp.float32), None)})
        ...     restore(f"{folder}/one", expected=wish).extra["m"][0].tolist()
        [1.0, 1.0]
    """
    return _restore(Path(path).resolve(), expected)[0]


def _restore(folder: Path, expected: Checkpoint | None) -> tuple[Checkpoint, dict[str, Any]]:
    """The checkpoint and its manifest; every file is read and verified once."""
    expected = Checkpoint() if expected is None else expected
    manifest = SEAL.read(folder)
    SEAL.verify(folder, manifest)
    arrays: dict[str, Any] = manifest["arrays"]

    routers = _restore_routers(folder, manifest, expected)
    templates = {name: jax.eval_shape(router.init_state) for name, router in routers.items()}
    check_against(
        f"{folder}: states",
        templates,
        arrays["states"],
        "A state belongs to another rule or to other sizes of its rule: use the version of the "
        "library that wrote it, or fit the rule and save again.",
    )
    if expected.params is not None:
        check_against(
            f"{folder}: params",
            expected.params,
            arrays["params"],
            "Build the model as it was when the checkpoint was saved.",
        )
    for name, example in expected.extra.items():
        if f"extra-{name}" not in arrays:
            names = [item.removeprefix("extra-") for item in arrays if item.startswith("extra-")]
            raise CheckpointError(
                f"{folder}: expected extra {name!r}, got {listed(names)}. "
                "Ask for one of these, or leave it out."
            )
        check_against(
            f"{folder}: extra {name!r}",
            example,
            arrays[f"extra-{name}"],
            "Build the example as it was when the checkpoint was saved.",
        )

    try:
        config = None if manifest["config"] is None else Config.from_json(manifest["config"])
    except ConfigError as error:
        raise CheckpointError(
            f"{folder}: config: {error} Use {LIBRARY} {manifest['library_version']} to read it."
        ) from error

    wanted = ["params", "states", *(f"extra-{name}" for name in expected.extra)]
    stored = {item: read_arrays(folder, item, arrays[item], SEAL.renew) for item in wanted}
    # Every file is opened by path, so an overwrite in between could mix two checkpoints.
    if SEAL.read(folder) != manifest:
        raise CheckpointError(
            f"{folder}: expected one checkpoint, got it replaced while it was read. "
            "Restore it again."
        )
    params = rebuilt_tree(folder, stored["params"], arrays["params"], expected.params)
    described = {name: LayerSpec.from_json(x) for name, x in manifest.get("layers", {}).items()}
    located = locate_layers(
        {name: router for name, router in routers.items() if name not in described},
        params,
        manifest["metadata"],
    )
    restored = Checkpoint(
        params=params,
        routers=routers,
        layers={**described, **located},
        states=shaped_like(templates, stored["states"]),
        config=config,
        metadata=manifest["metadata"],
        extra={name: shaped_like(x, stored[f"extra-{name}"]) for name, x in expected.extra.items()},
    )
    return restored, manifest


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class OpenCheckpoint:
    """A checkpoint that was read and verified once, for everything that is asked of it.

    Attributes:
        path: its folder.
        content: what ``restore`` returns.
        about: what ``load_metadata`` returns.
    """

    path: Path
    content: Checkpoint
    about: Mapping[str, Any]

    def router_name(self, name: str | None = None) -> str:
        """Returns the name of the router that is meant.

        Args:
            name: a router; or a rule, the part before ``/layer_3`` or the rule of ``layer_3`` itself,
                whose first layer is meant; or None for the checkpoint's default, see
                ``moe_jax.checkpoint.layers.default_router``.

        Raises:
            ValueError: no such router or rule.
        """
        routers = self.content.routers
        if not routers:
            raise ValueError(
                f"{self.path}: expected a checkpoint with a router, got one without. Inspect it."
            )
        if name is None:
            return default_router(routers)
        if name in routers:
            return name
        first = own_rule(self.content.metadata)
        layers = layers_of_rule(routers, name) if name else []
        if not layers and name and name == first:
            layers = layers_of_rule(routers, "")
        if not layers:
            rules = dict.fromkeys(filter(None, map(rule_of, routers)))
            own = [one for one in routers if not rule_of(one)]
            choices = [*([first] if first and own else []), *own, *rules]
            single = ", or RULE/layer_N for one layer of a rule" if rules else ""
            raise ValueError(
                f"router: expected one of {', '.join(choices)}{single}, got {name!r}. See moe-jax "
                "inspect."
            )
        return layers[0]

    def layer(self, name: str | None = None) -> StoredLayer:
        """Returns a router with its parameters and experts; ``name`` as in ``router_name``.

        Raises:
            ValueError: no such router, or the checkpoint has no parameters for it.
        """
        chosen = self.router_name(name)
        spec = self.content.layers.get(chosen)
        if spec is None:
            raise ValueError(
                f"{self.path}: expected parameters of router {chosen!r}, got none under that name. "
                "Save params as {name: {'kernel': ...}} or {name: {'router': {'kernel': ...}}}, or "
                "say where they are: Checkpoint(layers={name: LayerSpec(...)})."
            )
        return stored_layer(
            chosen,
            self.content.routers[chosen],
            self.content.states[chosen],
            self.content.params,
            spec,
        )


def open_checkpoint(path: PathLike) -> OpenCheckpoint:
    """Reads and verifies a checkpoint once, for callers that ask several things of it.

    Raises:
        CheckpointError: as ``restore``.

    Example:
        >>> import tempfile
        >>> from moe_jax.checkpoint import save
        >>> from moe_jax.routers import TopK
        >>> router = TopK(num_experts=4, k=2)
        >>> content = Checkpoint(
        ...     params={"block": router.init(jax.random.key(0), 16)},
        ...     routers={"block": router}, states={"block": router.init_state()},
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     opened = open_checkpoint(save(f"{folder}/one", content))
        >>> opened.layer("block").width
        16
    """
    folder = Path(path).resolve()
    content, manifest = _restore(folder, None)
    return OpenCheckpoint(path=folder, content=content, about=_about(manifest))


def load_metadata(path: PathLike) -> dict[str, Any]:
    """Returns what the manifest of a checkpoint says, as plain JSON values; no array is read.

    Returns:
        ``format``, ``library_version``, ``versions``, ``routers`` (name to ``router`` JSON and
        ``fingerprint``), ``layers`` (name to ``LayerSpec`` JSON), ``config`` (JSON or None),
        ``metadata`` as it was saved, ``arrays`` (``params``, ``states``, ``extra-NAME`` to leaf
        name to e.g. ``float32[3, 4]``),
        ``num_bytes`` on disk, and ``checksum``, 64 hex digits over all of it, arrays included:
        it names this checkpoint and no other.

    Raises:
        CheckpointError: there is no checkpoint, or its manifest is damaged or of a newer format.
            The array files are not looked at: ``restore`` does that.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> from moe_jax.checkpoint import save
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save(f"{folder}/one", Checkpoint(params={"w": jnp.ones(3)}, metadata={"a": 1}))
        ...     about = load_metadata(f"{folder}/one")
        >>> about["metadata"], about["arrays"]["params"]
        ({'a': 1}, {'w': 'float32[3]'})
    """
    return _about(SEAL.read(Path(path).resolve()))


def _about(manifest: dict[str, Any]) -> dict[str, Any]:
    words = ("format", "library_version", "versions", "routers", "config", "metadata")
    return {
        **{word: manifest[word] for word in words},
        "layers": manifest.get("layers", {}),
        "arrays": {item: leaf_table(entry) for item, entry in manifest["arrays"].items()},
        "checksum": checksum_of(manifest),
        "num_bytes": sum(entry["size"] for entry in manifest["files"].values()),
    }


def _restore_routers(
    folder: Path, manifest: dict[str, Any], expected: Checkpoint
) -> dict[str, Router]:
    routers = {}
    # The manifest is sorted as text, which puts layer_10 before layer_2.
    for name in sorted(manifest["routers"], key=natural_order):
        entry = manifest["routers"][name]
        try:
            router = routers[name] = router_from_json(entry["router"])
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{folder}: router {name!r}: {error}") from error
        if router.fingerprint() != entry["fingerprint"]:
            raise CheckpointError(
                f"{folder}: router {name!r}: expected fingerprint {entry['fingerprint']}, got "
                f"{router.fingerprint()}: this version of the library reads the rule differently. "
                f"Use {LIBRARY} {manifest['library_version']}, or calibrate and save again."
            )
    if expected.routers:
        wanted = {name: _words(router) for name, router in expected.routers.items()}
        stored = {name: _words(router) for name, router in routers.items()}
        if wanted != stored:
            raise CheckpointError(
                f"{folder}: routers: expected the ones given, got "
                f"{difference_between(wanted, stored)}. Build the routers from the checkpoint, or "
                "choose the checkpoint that fits these."
            )
    return routers


def _words(router: Router) -> str:
    return json.dumps(router.to_json(), sort_keys=True)

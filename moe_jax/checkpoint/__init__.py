"""Routers, parameters, states and their provenance on disk, by orbax.

A checkpoint is one folder::

    PATH/
      manifest.json      routers, layers, config, metadata, shapes of arrays, SHA-256 of every file
      arrays/params/     each an orbax checkpoint, which orbax reads without this library:
      arrays/states/     a flat mapping from names such as "layer_0/kernel" to arrays
      arrays/extra-NAME/

It is written beside its place and renamed into it last, so PATH either does not exist or is whole.
A file that was damaged later (cut short, a bit flipped, a file added or lost) no longer matches the
manifest, and the checkpoint is refused before a single array is read. Nothing is pickled. A process
that is killed while saving leaves a hidden ``.NAME.saving-*`` beside PATH, which may be deleted.
"""

from moe_jax.checkpoint.content import FORMAT, Checkpoint
from moe_jax.checkpoint.layers import LayerSpec, StoredLayer
from moe_jax.checkpoint.reader import OpenCheckpoint, load_metadata, open_checkpoint, restore
from moe_jax.checkpoint.tree import CheckpointError
from moe_jax.checkpoint.writer import SaveHandle, check_free, save, save_async

__all__ = [
    "FORMAT",
    "Checkpoint",
    "CheckpointError",
    "LayerSpec",
    "OpenCheckpoint",
    "SaveHandle",
    "StoredLayer",
    "check_free",
    "load_metadata",
    "open_checkpoint",
    "restore",
    "save",
    "save_async",
]

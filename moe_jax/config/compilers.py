"""The environment that the compilers of absent accelerators need."""

from __future__ import annotations

import os

# libtpu asks the metadata server of a TPU machine unless these are set, and locks itself to one
# process of a machine. The accelerator type is a placeholder: the topology's name decides.
_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}


def prepare_tpu_compiler() -> None:
    """Sets what libtpu reads when it is loaded on a machine without TPUs; what is set already stays."""
    for name, value in _TPU.items():
        os.environ.setdefault(name, value)

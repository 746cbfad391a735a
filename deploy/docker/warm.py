"""Compiles the functions of a configuration into JAX's compile cache: python warm.py CONFIG.

Run while the image is built. The engine compiles its functions as at every start, and JAX writes them
to the folder JAX_COMPILATION_CACHE_DIR.
"""

import os
import sys
from pathlib import Path

from moe_jax import RouterFactory

with RouterFactory.create_from_config_file(sys.argv[1]) as router:
    ready, reasons = router.readiness()
if not ready:
    sys.exit(f"expected a router that is ready, but it is not: {', '.join(reasons)}")
entries = len(list(Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).iterdir()))
if not entries:
    sys.exit(
        "expected compiled functions in the cache, got none. Check that the folder is writable."
    )
print(f"{entries} entries in the compile cache")

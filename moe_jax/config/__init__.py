"""One frozen configuration, from JSON files, ``MOE_*`` variables and arguments.

The words are the production guide's (``router_config``, ``complexity_estimator``,
``noise_factor`` ...), and only this module knows them: ``build_router`` turns them into the
library's own. A value has the same name whichever way it is given:

================================= ============================== =========================
explicit argument                 environment                    file
================================= ============================== =========================
``load_config(num_experts=16)``   ``MOE_NUM_EXPERTS=16``         ``{"router_config":
                                                                 {"num_experts": 16}}``
================================= ============================== =========================

An argument wins over the environment, the environment over the file, the file over the default.
Nothing is ignored: an unknown key or an unknown ``MOE_*`` variable is an error, because a setting
that is misspelt and silently dropped costs more than a start that fails.
"""

from moe_jax.config.kinds import ConfigError, ConfigFileError
from moe_jax.config.loading import ENV_PREFIX, load_config
from moe_jax.config.settings import (
    Config,
    PerformanceConfig,
    RouterConfig,
    SecurityConfig,
    ServingConfig,
)
from moe_jax.config.words import PRESETS, build_router

__all__ = [
    "ENV_PREFIX",
    "PRESETS",
    "Config",
    "ConfigError",
    "ConfigFileError",
    "PerformanceConfig",
    "RouterConfig",
    "SecurityConfig",
    "ServingConfig",
    "build_router",
    "load_config",
]

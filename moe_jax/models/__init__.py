"""Whole published Mixture-of-Experts models: load, run, generate, save back."""

from moe_jax.models.block_checkpoint import block_checkpoint
from moe_jax.models.causal_lm import CausalLM, DecoderOutput
from moe_jax.models.comparison import Comparison, compare
from moe_jax.models.config_reader import decoder_config, supported_decoders
from moe_jax.models.decoder_config import DecoderConfig
from moe_jax.models.evaluation import Evaluation, evaluate
from moe_jax.models.generate import Sampling, generate, stream_tokens
from moe_jax.models.kv_cache import KVCache, init_cache
from moe_jax.models.load import HubFolder, StreamedLayer, load_model, stream_layers
from moe_jax.models.model_budget import Budget, fit_budget, load_budget, save_budget
from moe_jax.models.save import save_model

__all__ = [
    "Budget",
    "CausalLM",
    "Comparison",
    "DecoderConfig",
    "DecoderOutput",
    "Evaluation",
    "HubFolder",
    "KVCache",
    "Sampling",
    "StreamedLayer",
    "block_checkpoint",
    "compare",
    "decoder_config",
    "evaluate",
    "fit_budget",
    "generate",
    "init_cache",
    "load_budget",
    "load_model",
    "save_budget",
    "save_model",
    "stream_layers",
    "stream_tokens",
    "supported_decoders",
]

"""A ``config.json`` that remembers which of its keys were understood."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from moe_jax.interop.value_kinds import (
    COUNT,
    COUNT_OR_ZERO,
    FLAG,
    NAME,
    NOT_NEGATIVE,
    OBJECT,
    POSITIVE,
    ValueKind,
    check_value,
    is_number,
    is_whole,
    list_of,
)
from moe_jax.models.decoder_config import RopeConfig
from moe_jax.models.rope import KINDS

# Keys that change no number of a forward pass: training, generation, bookkeeping of other libraries.
_HARMLESS = """
_attn_implementation _attn_implementation_autoset _name_or_path add_cross_attention architectures
attention_dropout attn_implementation auto_map aux_loss_alpha bad_words_ids begin_suppress_tokens
bos_token_id chunk_size_feed_forward classifier_dropout cross_attention_hidden_size
decoder_start_token_id diversity_penalty do_sample dtype early_stopping embd_pdrop
encoder_no_repeat_ngram_size eod_token_id eos_token_id ep_size exponential_decay_length_penalty
finetuning_task forced_bos_token_id forced_eos_token_id head_dropout hidden_dropout id2label
im_end_id im_start_id initializer_range is_decoder is_encoder_decoder label2id length_penalty
max_length max_position_embeddings min_length model_type model_version no_repeat_ngram_size
num_beam_groups num_beams num_mtp_layers num_nextn_predict_layers num_return_sequences
output_attentions output_hidden_states output_router_logits output_scores pad_token_id prefix
pretraining_tp problem_type pruned_heads remove_invalid_values repetition_penalty resid_pdrop
return_dict return_dict_in_generate router_aux_loss_coef router_bias_update_speed
router_z_loss_coef sep_token_id seq_aux suppress_tokens task_specific_params temperature
tf_legacy_loss tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p
unk_token_id use_bfloat16 use_cache vocab_padding
"""
HARMLESS = frozenset(_HARMLESS.split())

_ROPE = """
rope_type type rope_theta partial_rotary_factor factor original_max_position_embeddings
attention_factor beta_fast beta_slow mscale mscale_all_dim truncate low_freq_factor
high_freq_factor short_factor long_factor short_mscale long_mscale finetuned
"""
_ROPE_KEYS = frozenset(_ROPE.split())

_NAMES = list_of("names, one a layer", NAME.holds)
_ABOVE_1 = ValueKind("a number above 1", lambda v: is_number(v) and v > 1)
_LAST_LAYER = ValueKind("a layer's number, or -1", lambda v: is_whole(v, least=-1))
_BASES = list_of("numbers of at least 0, or null", lambda v: v is None or NOT_NEGATIVE.holds(v))
_EVERY = ValueKind(
    "a whole number of at least 1, or a list of 0 and 1",
    lambda v: COUNT.holds(v) or (isinstance(v, list) and all(flag in (0, 1) for flag in v)),
)


def _kinds(kind: ValueKind, keys: str) -> dict[str, ValueKind]:
    return dict.fromkeys(keys.split(), kind)


# Keys with another kind of value are refused: the text "false" would be true, and a window of true
# would be one token. Keys that are not listed are checked where they are read.
_KINDS: dict[str, ValueKind] = {
    **_kinds(COUNT, "num_hidden_layers hidden_size num_attention_heads num_key_value_heads"),
    **_kinds(COUNT, "vocab_size q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim"),
    **_kinds(COUNT, "v_head_dim decoder_sparse_step moe_layer_interval rotary_dim"),
    **_kinds(COUNT, "max_position_embeddings original_max_position_embeddings"),
    **_kinds(COUNT_OR_ZERO, "head_dim intermediate_size shared_intermediate_size sliding_window"),
    **_kinds(COUNT_OR_ZERO, "first_k_dense_replace num_dense_layers max_window_layers"),
    **_kinds(COUNT_OR_ZERO, "moe_layer_start_index num_nextn_predict_layers"),
    **_kinds(FLAG, "attention_bias qkv_bias use_bias mlp_bias lm_head_bias tie_word_embeddings"),
    **_kinds(FLAG, "use_qk_norm rope_interleave mup_enabled use_sliding_window truncate"),
    **_kinds(POSITIVE, "clip_qkv attention_multiplier embedding_multiplier residual_multiplier"),
    **_kinds(POSITIVE, "logits_scaling partial_rotary_factor factor alpha attention_factor"),
    **_kinds(POSITIVE, "low_freq_factor high_freq_factor short_mscale long_mscale"),
    **_kinds(NOT_NEGATIVE, "rms_norm_eps beta_fast beta_slow mscale mscale_all_dim"),
    **_kinds(NAME, "hidden_act rope_type type"),
    **_kinds(OBJECT, "rope_parameters rope_scaling"),
    **_kinds(_NAMES, "layer_types mlp_layer_types"),
    **_kinds(list_of("numbers above 0", POSITIVE.holds), "short_factor long_factor"),
    "mlp_only_layers": list_of("layers' numbers", COUNT_OR_ZERO.holds),
    "moe_layer_end_index": _LAST_LAYER,
    "moe_layer_freq": _EVERY,
    "layer_rope_theta": _BASES,
    "rope_theta": _ABOVE_1,
}


class ConfigKeys:
    """Reads a config by key and refuses what nobody read.

    Args:
        model_type: for messages.
        config: ``config.json`` as a dict.
        defaults: of the config class in transformers, for keys that the file leaves out.
    """

    def __init__(
        self, model_type: str, config: Mapping[str, Any], defaults: Mapping[str, Any]
    ) -> None:
        self.model_type = model_type
        self._config = config
        self._defaults = defaults
        self._read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key. Null means ``default``; a key that is left out means the default of
        transformers, else ``default``.

        Raises:
            ValueError: the config states a value of another kind than the key has.
        """
        self._read.add(key)
        value = self._config[key] if key in self._config else self._defaults.get(key)
        if value is None:
            return default
        if key in self._config:
            self.check_kind(key, value)
        return value

    def check_kind(self, key: str, value: Any, *, place: str = "") -> None:
        """Refuses text where a number belongs, and the like.

        Args:
            key: whose kind is known.
            value: what the config states.
            place: for the message, the object that the key is in, with a dot after it.

        Raises:
            ValueError: the value is of another kind.
        """
        check_value(_KINDS.get(key), value, model_type=self.model_type, key=f"{place}{key}")

    def default(self, key: str) -> Any:
        """The default of transformers for a key, None where it has none."""
        return self._defaults.get(key)

    def number(self, key: str) -> int:
        """A positive whole number.

        Raises:
            ValueError: it is missing or something else.
        """
        value = self.get(key)
        if value is None:
            raise self.error(key, COUNT.words, value)
        check_value(COUNT, value, model_type=self.model_type, key=key)
        return value

    def fixed(self, key: str, values: tuple[Any, ...]) -> None:
        """Refuses a value other than those that the decoder implements."""
        value = self.get(key, values[0])
        if value not in values:
            listed = " or ".join(map(repr, values))
            raise self.error(key, listed, value)

    def error(self, key: str, wanted: str, value: Any) -> ValueError:
        """The error for a value that the decoder does not implement, or for a missing one (None)."""
        if value is None:
            return ValueError(
                f"config of {self.model_type!r}: expected {key} to be {wanted}, got none. Add it to "
                "config.json."
            )
        return ValueError(
            f"config of {self.model_type!r}: expected {key} to be {wanted}, got {value!r}. The "
            "model would give other numbers; nothing else is implemented."
        )

    def finish(self, understood: frozenset[str]) -> None:
        """Refuses keys that were neither read, nor are harmless, nor in ``understood``.

        A key whose value is null states nothing and passes.

        Raises:
            ValueError: the keys are named.
        """
        accepted = self._read | HARMLESS | understood
        unknown = sorted(k for k, v in self._config.items() if k not in accepted and v is not None)
        if unknown:
            raise ValueError(
                f"config of {self.model_type!r}: expected keys whose meaning is known, got "
                f"{', '.join(unknown[:8])}. A key that is passed over could change the model's "
                "numbers: remove it from config.json if it does not, else the model is not supported."
            )


def read_rope(
    keys: ConfigKeys,
    *,
    head_dim: int,
    interleaved: bool = False,
    layer_type: str | None = None,
    partial: float = 1.0,
) -> tuple[RopeConfig | None, float]:
    """The rotary positions of a config, and the factor that "mscale" puts on latent attention.

    Reads ``rope_parameters`` (transformers 5; one for all layers or one a layer type) or
    ``rope_scaling`` with ``rope_theta`` and ``partial_rotary_factor`` beside it.

    Args:
        keys: the config.
        head_dim: of which ``partial_rotary_factor`` is rotated.
        interleaved: how pairs are laid out.
        layer_type: which entry to take where ``rope_parameters`` have one a layer type.
        partial: ``partial_rotary_factor`` where the config states none.

    Returns:
        The positions, None where the config states that this layer type has none; and the factor on
        the softmax scale.

    Raises:
        ValueError: a kind or a key that is not known.
    """
    theta = keys.get("rope_theta", keys.default("rope_theta") or 10_000.0)
    partial = keys.get("partial_rotary_factor", partial)
    if keys.model_type == "minimax_m2" and keys.get("rotary_dim") is not None:
        partial = keys.get("rotary_dim") / head_dim
    scaling = keys.get("rope_scaling")
    stated = scaling or keys.get("rope_parameters") or keys.default("rope_parameters") or {}
    where = "rope_scaling" if scaling else "rope_parameters"
    if layer_type in stated:
        stated = stated[layer_type]
        if stated is None:
            return None, 1.0
        check_value(OBJECT, stated, model_type=keys.model_type, key=f"{where}.{layer_type}")
    alpha = stated.get("alpha") if keys.model_type == "hunyuan_v1_moe" else None
    # As at the top, null states nothing.
    stated = {key: value for key, value in stated.items() if value is not None}
    unknown = sorted(set(stated) - _ROPE_KEYS - ({"alpha"} if alpha is not None else set()))
    if unknown:
        raise keys.error(f"{where}.{unknown[0]}", "absent", stated[unknown[0]])
    for key, value in stated.items():
        keys.check_kind(key, value, place=f"{where}.")
    kind = stated.get("rope_type") or stated.get("type") or "default"
    if kind not in KINDS:
        raise keys.error("rope_type", f"one of {', '.join(KINDS)}", kind)
    if kind == "dynamic" and alpha:
        # HunYuan stretches the base by a fixed factor, whatever the length.
        theta = stated.get("rope_theta", theta) * alpha ** (head_dim / (head_dim - 2))
        kind, stated = "default", {}
    longest = keys.get("max_position_embeddings", 0)
    original = (
        keys.get("original_max_position_embeddings")
        or stated.get("original_max_position_embeddings")
        or longest
    )
    partial = stated.get("partial_rotary_factor", partial)
    factor = stated.get("factor")
    if factor is None and kind in ("linear", "dynamic", "llama3"):
        raise keys.error(f"{where}.factor", f"a number, as {kind!r} needs it", factor)
    # Without them the formulas divide by 0.
    if kind == "dynamic" and not longest:
        raise keys.error("max_position_embeddings", f"a number, as {kind!r} needs it", None)
    if kind in ("yarn", "llama3", "longrope") and not original:
        raise keys.error(
            f"{where}.original_max_position_embeddings", f"a number, as {kind!r} needs it", None
        )
    low, high = (float(stated.get(f"{end}_freq_factor", 1.0)) for end in ("low", "high"))
    if kind == "llama3" and high <= low:
        raise keys.error(f"{where}.high_freq_factor", f"above low_freq_factor, {low}", high)
    if factor is None:
        factor = longest / original if kind in ("yarn", "longrope") and longest else 1.0
    rope = RopeConfig(
        dim=int(head_dim * partial),
        theta=float(stated.get("rope_theta") or theta),
        kind=kind,
        interleaved=interleaved,
        factor=float(factor),
        original_length=original if kind in ("yarn", "llama3", "longrope") else 0,
        max_length=longest if kind == "dynamic" else 0,
        beta_fast=float(stated.get("beta_fast") or 32),
        beta_slow=float(stated.get("beta_slow") or 1),
        truncate=bool(stated.get("truncate", True)),
        low_freq_factor=low,
        high_freq_factor=high,
        short_factors=_factors(keys, kind, stated, "short_factor"),
        # transformers 5.24 keeps PhiMoE's short factors at every length; only its magnitude changes.
        long_factors=_factors(
            keys, kind, stated, "short_factor" if keys.model_type == "phimoe" else "long_factor"
        ),
        attention_factor=_attention_factor(keys, kind, stated, float(factor), original),
        long_attention_factor=_attention_factor(
            keys, kind, stated, float(factor), original, magnitude="long_mscale"
        ),
    )
    if rope.dim < 2 or rope.dim % 2 or rope.dim > head_dim:
        raise keys.error(
            "partial_rotary_factor", f"such that an even part of {head_dim} is rotated", partial
        )
    for key, values in (("short_factor", rope.short_factors), ("long_factor", rope.long_factors)):
        if kind == "longrope" and len(values) != rope.dim // 2:
            raise keys.error(key, f"a list of {rope.dim // 2} numbers", f"{len(values)} of them")
    everywhere = stated.get("mscale_all_dim") or 0
    stretch = _magnitude(float(factor), everywhere) if kind != "default" and everywhere else 1.0
    return rope, stretch * stretch


def _factors(keys: ConfigKeys, kind: str, stated: Mapping[str, Any], key: str) -> tuple[float, ...]:
    """The divisors of "longrope", empty for other kinds."""
    if kind != "longrope":
        return ()
    if not isinstance(stated.get(key), list):
        raise keys.error(f"rope_parameters.{key}", "a list of numbers", stated.get(key))
    return tuple(map(float, stated[key]))


def _magnitude(factor: float, multiplier: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0


def _attention_factor(
    keys: ConfigKeys,
    kind: str,
    stated: Mapping[str, Any],
    factor: float,
    original: int,
    *,
    magnitude: str = "short_mscale",
) -> float:
    """What cosine and sine are multiplied by; ``magnitude`` is the key where PhiMoE states it."""
    given = stated.get("attention_factor")
    if kind == "longrope":
        if keys.model_type == "phimoe":
            given = stated.get(magnitude)
            if given is None:
                raise keys.error(f"rope_parameters.{magnitude}", "a number", given)
        if given is None:
            stretched = factor > 1
            given = math.sqrt(1 + math.log(factor) / math.log(original)) if stretched else 1.0
        return float(given)
    if kind != "yarn":
        return 1.0
    if given is not None:
        return float(given)
    top, bottom = stated.get("mscale"), stated.get("mscale_all_dim")
    if top and bottom:
        return _magnitude(factor, top) / _magnitude(factor, bottom)
    return _magnitude(factor)

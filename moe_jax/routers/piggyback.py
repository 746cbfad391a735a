"""Keep and piggyback: a token's lower-ranked experts are used only if another token loads them."""

from __future__ import annotations

import dataclasses

from moe_jax.checks import check_count, check_range
from moe_jax.routers.batch_aware import BatchAware, first_ranks, loaded_by
from moe_jax.routing.gate import Gate
from moe_jax.routing.scoring import Scoring


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piggyback(BatchAware):
    """OEA (arXiv:2511.02237): opportunistic expert activation at decode.

    Each token keeps its ``keep_k`` best experts. Together they decide which experts are loaded. Then a
    token fills up to ``k`` experts with the best of those, which cost nothing more to read.

    Args:
        num_experts: E.
        k: most experts of a token, usually the trained k.
        keep_k: experts that every token keeps, at least 1.
        reach: how far down its ranking a token may look for a loaded expert; None is all experts.
            With ``reach=k`` a token only drops experts and never uses one that top-k would not.
        max_tokens: larger batches are routed by plain top-k.
        gate: the map to logits.
        scoring: logits to scores and weights.

    Example:
        >>> import jax
        >>> router = Piggyback(num_experts=64, k=8, keep_k=3)
        >>> params, state = router.init(jax.random.key(0), 16), router.init_state()
        >>> routing = router(params, state, jax.random.normal(jax.random.key(1), (4, 16)))
        >>> int(routing.expert_mask.any(axis=0).sum()) <= 12
        True
    """

    num_experts: int
    k: int
    keep_k: int = 1
    reach: int | None = None
    max_tokens: int = 64
    gate: Gate = Gate()
    scoring: Scoring = Scoring()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("keep_k", self.keep_k, fix="A token always keeps its best expert.")
        check_range("keep_k", self.keep_k, most=self.k, fix="A token fills up to k experts.")
        if self.reach is not None:
            check_count("reach", self.reach, least=self.k, fix="None looks at all experts.")

    def choose(self, slots, real):
        kept = first_ranks(real.shape, self.keep_k) & real
        near = first_ranks(real.shape, self.reach or self.num_experts) & real
        return kept | (near & loaded_by(slots, kept)[slots.indices])

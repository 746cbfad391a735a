"""The gate: who asks, whether they may, and what becomes of those who misbehave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moe_jax.config import Config
from moe_jax.serving import admission
from moe_jax.serving.engine.recorder import Recorder
from moe_jax.serving.engine.requests import LOCAL, Client
from moe_jax.serving.errors import CODES, ServingError

# Refusals that count towards an automatic block. `too_large` is not among them: such a request can
# never pass and is refused before it costs anything, so a client gains nothing by repeating it.
VIOLATIONS = (
    "malformed",
    "invalid_values",
    "rate_limited",
    "unauthorized",
    "unsupported_media_type",
    "request_timeout",
)


class AccessControl:
    """Level, limits, blocks and keys of one engine.

    Args:
        config: the configuration.
        clock: seconds that never go back.
        recorder: counts refusals.
        log: a structlog logger.
        notify: called as ``notify(event, **facts)``.
    """

    def __init__(
        self,
        config: Config,
        *,
        clock: Callable[[], float],
        recorder: Recorder,
        log: Any,
        notify: Callable[..., None],
    ) -> None:
        serving = config.serving
        self._recorder = recorder
        self._log = log
        self.level = level = admission.level_for(
            config.security.security_level,
            nonfinite=serving.nonfinite,
            requests_per_minute=serving.rate_limit_requests,
            tokens_per_minute=serving.rate_limit_tokens,
        )
        self.limiter = admission.RateLimiter(
            requests_per_minute=level.requests_per_minute,
            tokens_per_minute=level.tokens_per_minute,
            redis_url=serving.redis_url,
            clock=clock,
            notify=notify,
        )
        self.blocks = admission.ClientBlocks(
            after=level.block_after,
            window=level.block_window,
            first_seconds=level.block_seconds,
            longest_seconds=level.block_max_seconds,
            clock=clock,
        )
        self.keys = admission.Keys(serving.api_key_list)
        self._admin = admission.Keys([serving.admin_key] if serving.admin_key else [])
        self._proxies = admission.TrustedProxies(config.serving.proxy_list)
        self._warned_of_proxy = False
        if serving.replicas > 1 and not serving.redis_url and level.requests_per_minute:
            log.warning(
                "limits_not_shared",
                hint=f"{serving.replicas} replicas count on their own, so a client's real limit is "
                f"{serving.replicas} times the configured one. Set MOE_REDIS_URL to share it.",
            )
        if level.api_key_required and not self.keys:
            log.warning(
                "no_api_keys",
                hint="security level strict asks for API keys and none are configured, so remote "
                "requests are all refused. Set MOE_API_KEYS.",
            )

        if self.keys and not level.api_key_required:
            log.warning(
                "api_keys_optional",
                hint=f"security level {level.name} answers requests without a key too; a key only "
                "identifies its client. Set MOE_SECURITY_LEVEL=strict to require one.",
            )

    def identify(self, api_key: str | None, peer: str, forwarded_for: str | None) -> Client:
        """See ``RouterEngine.identify``."""
        if forwarded_for is not None and not self._warned_of_proxy:
            self._warn_of_proxy(peer)
        address = Client(self._proxies.client_address(peer, forwarded_for))
        if api_key is not None and self.keys:
            if self.keys.valid(api_key):
                return Client(admission.client_id(api_key))
        elif not self.level.api_key_required:
            # No key was sent, or this service issues no keys and the one sent is ignored.
            return address
        error = ServingError(
            "unauthorized",
            "expected a valid API key, got none or a wrong one. Send one that the operator gave you.",
        )
        try:
            self.blocks.check(address.id)
        except ServingError as blocked:
            error = blocked
        raise self.refused(error, address)

    def _warn_of_proxy(self, peer: str) -> None:
        """Logs once that a header of a proxy is ignored: all of its clients are then one client,
        which share one limit, and which one of them can have blocked."""
        if self._proxies.trusts(peer):
            return
        self._warned_of_proxy = True
        self._log.warning(
            "proxy_not_trusted",
            peer=peer,
            hint="a request has X-Forwarded-For, but its peer is not in MOE_TRUSTED_PROXIES, so the "
            "header is ignored and all clients behind that peer share one limit. If the peer is your "
            "proxy, add its address or network to MOE_TRUSTED_PROXIES.",
        )

    def is_admin(self, bearer: str | None) -> bool:
        """See ``RouterEngine.is_admin``."""
        return self._admin.valid(bearer)

    def authorize_admin(self, bearer: str | None, peer: str, forwarded_for: str | None) -> None:
        """See ``RouterEngine.authorize_admin``."""
        address = Client(self._proxies.client_address(peer, forwarded_for))
        if not self._admin:
            error = ServingError(
                "unauthorized", "this service has no admin key: its operator sets MOE_ADMIN_KEY."
            )
            self._recorder.refused(error)  # no key can be guessed, so it is no violation
            raise error
        # A block does not shut the operator out, who may share an address with whoever is blocked.
        if not self._admin.valid(bearer):
            got = "none" if bearer is None else "another key"
            message = f"expected the admin key as a bearer token, got {got}."
            raise self.refused(ServingError("unauthorized", message), address)

    def admit(self, client: Client, *, tokens: int, requests: int) -> None:
        """See ``RouterEngine.admit``."""
        try:
            self.blocks.check(client.id)
            self.limiter.take(client.id, requests=requests, tokens=tokens)
        except ServingError as error:
            raise self.refused(error, client) from None

    def violation(self, client: Client, kind: str) -> None:
        """See ``RouterEngine.violation``."""
        self.refused(ServingError(kind if kind in CODES else "malformed", kind), client)

    def refused(self, error: ServingError, client: Client) -> ServingError:
        """Counts a refusal and returns it to be raised. Calls in process are never blocked."""
        self._recorder.refused(error)
        if error.code not in VIOLATIONS or client == LOCAL:
            return error
        if self.blocks.violation(client.id, error.code):
            self._log.warning(
                "client_blocked",
                client=client.id,
                reason=error.code,
                seconds=round(self.blocks.seconds_left(client.id)),
            )
        return error

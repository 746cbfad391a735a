"""gRPC, optional: the same engine, limits and errors behind the protocol's gRPC service.

A call is identified and admitted by its metadata. Only then is its message received, for which the
largest size is taken from the account of bytes first, because gRPC does not say how long a message
is until it is there. Messages stay bytes until the client's limits are checked, as over HTTP.
"""

from __future__ import annotations

import ipaddress
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from moe_jax.serving.errors import ServingError
from moe_jax.serving.http.byte_account import Lease, Turns
from moe_jax.serving.http.connection import MIN_RATE, WRITE_SECONDS
from moe_jax.serving.http.deadlines import Deadlines
from moe_jax.serving.http.grpc_call import GrpcCall, peer_of
from moe_jax.serving.http.grpc_messages import MESSAGES, SERVICE, split_raw_contents
from moe_jax.serving.http.grpc_methods import LIMITED, METHODS, UNREAD, GrpcMethod
from moe_jax.serving.http.middleware import MOST_REASON
from moe_jax.serving.http.strict_json import malformed
from moe_jax.serving.http.transport import TransportContext, as_serving_error, retry_after

_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
# Probes call these every few seconds, so they are logged at debug level.
_QUIET = frozenset({"ServerLive", "ServerReady", "ModelReady"})
# Threads beyond those of inference, so that probes are answered while it is busy.
_SPARE_THREADS = 4


def grpc_address(host: str, port: int) -> str:
    """Returns ``host:port`` as gRPC reads it: an IPv6 address goes in brackets.

    Example:
        >>> grpc_address("127.0.0.1", 80), grpc_address("::1", 80), grpc_address("[::1]", 80)
        ('127.0.0.1:80', '[::1]:80', '[::1]:80')
    """
    try:
        is_version_6 = ipaddress.ip_address(host.partition("%")[0]).version == 6
    except ValueError:
        is_version_6 = False
    return f"[{host}]:{port}" if is_version_6 else f"{host}:{port}"


class GrpcServer:
    """The gRPC service on its own port.

    Args:
        transport: what it shares with HTTP.
        host: address to listen on.
        port: port to listen on; 0 takes a free one.

    Attributes:
        port: the port in use.

    Raises:
        ValueError: nothing can listen there.
    """

    def __init__(self, transport: TransportContext, host: str, port: int) -> None:
        self.transport = transport
        self._turns = Turns()
        self._deadlines = Deadlines()
        self._calls = threading.BoundedSemaphore(transport.capacity)
        threads = transport.capacity + _SPARE_THREADS
        self._server = grpc.server(
            ThreadPoolExecutor(threads, thread_name_prefix="moe-grpc"),
            maximum_concurrent_rpcs=threads,
            options=[
                ("grpc.max_receive_message_length", transport.body_limit),
                ("grpc.max_send_message_length", -1),
                ("grpc.max_concurrent_streams", threads),
                ("grpc.so_reuseport", 0),
            ],
        )
        # To gRPC every method takes a stream, which has the same form on the wire for one message:
        # its handler is called before the message is received, and can refuse it unread.
        handlers = {
            name: grpc.stream_unary_rpc_method_handler(self._handler(name, method))
            for name, method in METHODS.items()
        }
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, handlers),)
        )
        address = grpc_address(host, port)
        try:
            self.port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise ValueError(
                f"{address}: expected an address where gRPC can listen. Give another --host or "
                "--grpc-port."
            ) from error

    def start(self) -> None:
        """Starts taking requests."""
        self._server.start()

    def stop(self, seconds: float) -> threading.Event:
        """Takes no more requests; those in flight have ``seconds``. The event is set at the end."""
        ended = self._server.stop(seconds)
        self._deadlines.close()
        return ended

    def _handler(self, name: str, method: GrpcMethod) -> Callable[[Iterator[bytes], Any], bytes]:
        def handle(messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
            call: GrpcCall | None = None
            try:
                call = GrpcCall(self.transport, context)
                answer = self._answer(name, method, call, messages)
                self._log(name, call, context, "ok")
                return answer
            except Exception as error:
                refusal = self._refusal(name, call, error, context)
                if refusal is None:
                    raise  # the client has cancelled the call: nobody waits for an answer
            # The error itself is not kept: its traceback holds this frame, and the message in the
            # frames below, until the collector of cycles finds them.
            context.abort(*refusal)
            raise AssertionError("unreachable")

        return handle

    def _refusal(
        self, name: str, call: GrpcCall | None, error: Exception, context: grpc.ServicerContext
    ) -> tuple[grpc.StatusCode, str] | None:
        """Returns the status and text of a refusal, and sets its trailing metadata; None if the call
        was cancelled."""
        if isinstance(error, DecodeError):
            refusal = malformed("the message: expected the protocol's, got other bytes.")
        else:
            refusal = as_serving_error(error)
        if refusal is None:
            if not context.is_active():
                return None
            self.transport.engine.log.exception("failed", method=name)
            refusal = ServingError("internal", "an internal error, which is in the log.")
        if call is not None and call.refuses:
            self.transport.engine.violation(call.client(), refusal.code)
        self._log(name, call, context, refusal.code, error=refusal.message[:MOST_REASON])
        trailing = [("moe-code", refusal.code)]
        if (seconds := retry_after(refusal)) is not None:
            trailing.append(("retry-after", seconds))
        context.set_trailing_metadata(tuple(trailing))
        return _CODES[refusal.status], self.transport.message(refusal)

    def _log(
        self,
        name: str,
        call: GrpcCall | None,
        context: grpc.ServicerContext,
        code: str,
        **reason: str,
    ) -> None:
        """Writes the log line of a call, as the middleware does for a request over HTTP."""
        log = self.transport.engine.log
        facts = {} if call is None else call.log_facts()
        (log.debug if name in _QUIET else log.info)(
            "request",
            **{"client": peer_of(context.peer()), **facts},
            protocol="grpc",
            method=name,
            code=code,
            **reason,
        )

    def _answer(
        self, name: str, method: GrpcMethod, call: GrpcCall, messages: Iterator[bytes]
    ) -> bytes:
        """Returns the serialized answer of a call."""
        if name in UNREAD:
            return method(call, None).SerializeToString()
        # A probe of readiness needs no key, as over HTTP.
        if name != "ModelReady" or call.key or not self.transport.level.api_key_required:
            call.admit(requests=int(name in LIMITED))
        if not self._calls.acquire(blocking=False):
            raise ServingError(
                "queue_full",
                f"{self.transport.capacity} requests are being answered or wait. Try again soon.",
                retry_after=1.0,
            )
        lease = self.transport.account.lease()
        try:
            data = self._receive(call, messages, lease)
            raw: list[memoryview] = []
            if name in LIMITED:
                # Without a copy of the tensors, which may be nearly all of the message.
                data, raw = split_raw_contents(data)
            request = MESSAGES[f"{name}Request"].FromString(bytes(data))
            call.raw_contents = raw
            answer = method(call, request).SerializeToString()
            del data, raw, request
            call.raw_contents = []
            lease.keep(0)
            lease.take(len(answer))
        except BaseException:
            lease.release()
            raise
        finally:
            self._calls.release()
        self._watch_answer(call.context, lease)
        return answer

    def _receive(self, call: GrpcCall, messages: Iterator[bytes], lease: Lease) -> bytes:
        """Returns the message of a call.

        Raises:
            ServingError: ``queue_full`` if there was no room for it, or not this client's turn, in
                time; ``request_timeout`` if it did not arrive in time; ``malformed`` if none came.
        """
        seconds = self.transport.engine.config.serving.request_timeout_seconds
        allowed = min(seconds, call.context.time_remaining())
        until = call.started + allowed
        turn_until = until - allowed / 2  # a client whose turn comes late has time to send
        client = call.turn
        # One message of a client at a time, so that slow ones of one client do not fill the account.
        if not self._turns.begin(client, turn_until - time.monotonic()):
            raise ServingError(
                "queue_full",
                "an earlier message of this client is still arriving. Try again soon.",
                retry_after=1.0,
            )
        late = threading.Event()

        def cancel() -> None:
            late.set()
            call.context.cancel()

        try:
            lease.take(self.transport.body_limit, turn_until - time.monotonic())
            deadline = self._deadlines.start(max(0.0, until - time.monotonic()), cancel)
            try:
                data = next(messages, None)
            except Exception:
                if late.is_set():
                    raise _late(seconds) from None
                raise
            finally:
                self._deadlines.cancel(deadline)
        finally:
            self._turns.end(client)
        if data is None:
            raise _late(seconds) if late.is_set() else malformed("the call: expected a message.")
        lease.keep(len(data))
        return data

    def _watch_answer(self, context: grpc.ServicerContext, lease: Lease) -> None:
        """Keeps an answer in the account until its client has read it, or is cut off."""
        seconds = WRITE_SECONDS + lease.held / MIN_RATE
        deadline = self._deadlines.start(seconds, context.cancel)

        def ended() -> None:
            self._deadlines.cancel(deadline)
            lease.release()

        if not context.add_callback(ended):
            ended()


def _late(seconds: float) -> ServingError:
    return ServingError(
        "request_timeout",
        f"the message: expected all of it within {seconds:g} seconds, got part. Send faster.",
    )

"""An etcd in memory behind gRPC's interface, on a network that does what the test says."""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from etcd3 import etcdrpc as pb
from grpc import StatusCode
from grpc.aio import AioRpcError, UsageError

from ..settings import Settings
from .loop import Agenda, Loop, Wire
from .store import Store, refusal

TIMED_OUT = AioRpcError(StatusCode.DEADLINE_EXCEEDED, (), (), details="Deadline Exceeded")
CLOSED = AioRpcError(StatusCode.UNAVAILABLE, (), (), details="Socket closed")


@dataclass(frozen=True)
class Fate:
    """What becomes of one request.

    It applies after ``applies_s``, or never where that is None. The reply comes after
    ``answers_s``, though not before it has applied; in its place, where ``error`` is set, that.
    A request whose reply has not come at its time-out ends with ``TIMED_OUT``.
    """

    applies_s: float | None = 0.0
    answers_s: float = 0.0
    error: AioRpcError | None = None


FINE = Fate()
REQUEST_LOST = Fate(None, error=TIMED_OUT)
ANSWER_LOST = Fate(error=TIMED_OUT)


def answered_late(seconds: float) -> Fate:
    """Apply at once; the reply takes its time."""
    return Fate(answers_s=seconds)


def applied_late(seconds: float) -> Fate:
    """Report an error at once, and apply all the same, later."""
    return Fate(seconds, error=TIMED_OUT)


def refused(text: str, code: StatusCode = StatusCode.UNKNOWN) -> Fate:
    """Apply nothing, and answer with etcd's error."""
    return Fate(None, error=refusal(code, text))


@dataclass(eq=False)
class Call:
    """A request that was sent by a process to a member, and the answer on its way back."""

    sent_s: float
    method: str
    request: Any
    loop: Loop
    endpoint: str = ""
    metadata: tuple[tuple[str, str], ...] = ()
    outcome: Any = field(default=None, repr=False)
    """The reply or the error, once it has applied."""
    context: Any = field(default=None, repr=False)
    """What a subclass of FakeEtcd keeps with it."""


class FakeEtcd:
    """etcd as a process reaches it. Each request meets the next fate of its method's ``script``.

    Where that is empty, ``fate`` decides. Several processes may share it; ``latency_s`` is what a
    watch's replies take.
    """

    def __init__(self, agenda: Agenda, store: Store | None = None) -> None:
        self.agenda = agenda
        self.store = Store(agenda.time) if store is None else store
        self.fate: Callable[[Call], Fate] = lambda _: FINE
        self.latency_s: Callable[[], float] = lambda: 0.0
        self.calls: list[Call] = []
        self._scripts: dict[str, deque[Fate]] = defaultdict(deque)
        self._watches: list[_Watch] = []

    # What the test does.

    def script(self, method: str, *fates: Fate) -> None:
        """Give the next requests of a method these fates."""
        self._scripts[method].extend(fates)

    def sent(self, method: str) -> list[Any]:
        """Return the requests sent with a method."""
        return [call.request for call in self.calls if call.method == method]

    def end_watches(self, error: AioRpcError = CLOSED) -> None:
        """End all watches, as where connections are lost."""
        for watch in list(self._watches):
            watch.end(error)

    # What a process reaches.

    def open_channel(self, _settings: Settings, host: str, port: int) -> FakeChannel:
        """Open a channel to a member, for ``System.open_channel``."""
        return FakeChannel(self, f"{host}:{port}")

    def send(self, call: Call, answered: Callable[[Any], None]) -> None:
        """Take a request; ``answered`` gets its reply or error in a step of the process."""
        self.calls.append(call)
        script = self._scripts[call.method]
        fate = script.popleft() if script else self.fate(call)
        later = self.agenda.later
        if fate.applies_s is not None:
            later(fate.applies_s, partial(self.apply, call))
        if fate.error is not None:
            later(fate.answers_s, partial(answered, fate.error), call.loop)
        elif fate.applies_s is not None:
            after_s = max(fate.answers_s, fate.applies_s)
            later(after_s, lambda: answered(call.outcome), call.loop)

    def apply(self, call: Call) -> None:
        """Do what a request says."""
        try:
            call.outcome = self.store.apply(call.method, call.request)
        except AioRpcError as error:
            call.outcome = error
        if self.store.watched and call.method in ("LeaseGrant", "LeaseKeepAlive"):
            self._tell_of_ends()

    def watch(self, watch: _Watch, request: Any) -> Callable[[], None]:
        """Open a watch; return what ends it."""
        self._watches.append(watch)
        end = self.store.watch(request, watch.deliver)
        self._tell_of_ends()

        def ended() -> None:
            end()
            if watch in self._watches:
                self._watches.remove(watch)

        return ended

    def _tell_of_ends(self) -> None:
        """Have a watch told of the end of a lease when it comes, and not at the next request."""
        for ends_s in self.store.leases.values():
            self.agenda.later(ends_s - self.agenda.now_s, self.store.expire)


class FakeChannel:
    """The part of ``grpc.aio.Channel`` that etcd's client uses, as ``system.Channel`` has it."""

    def __init__(self, etcd: FakeEtcd, endpoint: str) -> None:
        self._etcd, self._endpoint = etcd, endpoint
        self._closed = False
        self._pending: dict[asyncio.Future[Any], None] = {}
        self._watches: list[_Watch] = []

    def unary_unary(
        self,
        method: str,
        request_serializer: Callable[[Any], bytes],
        response_deserializer: Callable[[bytes], Any],
    ) -> Callable[..., Any]:
        """Return a function of a request, which raises AioRpcError."""
        name = method.rpartition("/")[2]
        request_type = getattr(pb, f"{name}Request")

        async def call(request: Any, timeout: float | None = None, metadata: Any = ()) -> Any:
            loop: Any = asyncio.get_running_loop()
            self._check_open()
            sent = request_type.FromString(request_serializer(request))
            made = self._call(name, sent, metadata)
            answer = loop.create_future()

            def answered(outcome: Any) -> None:
                if outcome is not None and not answer.done():
                    answer.set_result(outcome)

            loop.act("before", made)
            self._etcd.send(made, answered)
            loop.act("behind", made)
            timer = loop.call_later(timeout, answered, TIMED_OUT) if timeout is not None else None
            self._pending[answer] = None
            try:
                outcome = await answer
            finally:
                del self._pending[answer]
                if timer is not None:
                    timer.cancel()
            if isinstance(outcome, AioRpcError):
                raise _anew(outcome)
            return response_deserializer(outcome.SerializeToString())

        return call

    def stream_stream(
        self,
        method: str,
        request_serializer: Callable[[Any], bytes],
        response_deserializer: Callable[[bytes], Any],
    ) -> Callable[..., AsyncIterator[Any]]:
        """Return a function of requests, whose replies raise AioRpcError at their end."""
        if method != "/etcdserverpb.Watch/Watch":
            raise NotImplementedError(method)

        async def replies(requests: AsyncIterator[Any], metadata: Any = ()) -> AsyncIterator[Any]:
            self._check_open()
            watch = _Watch(self._etcd, lambda sent: self._call("Watch", sent, metadata))
            self._watches.append(watch)
            reading = asyncio.ensure_future(watch.read(requests, request_serializer))
            try:
                async for reply in watch:
                    yield response_deserializer(reply.SerializeToString())
            finally:
                self._watches.remove(watch)
                watch.end(CLOSED)
                reading.cancel()

        return replies

    async def close(self, grace: float | None = None) -> None:
        """End every call under way: it is cancelled, as gRPC does it."""
        self._closed = True
        for pending in list(self._pending):
            pending.cancel()
        for watch in list(self._watches):
            watch.end(CLOSED)

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("Channel is closed.")

    def _call(self, method: str, request: Any, metadata: Any) -> Call:
        loop: Any = asyncio.get_running_loop()
        return Call(loop.time(), method, request, loop, self._endpoint, tuple(metadata or ()))


class _Watch:
    """A stream of replies: from the store, over the network, to the process that reads them."""

    def __init__(self, etcd: FakeEtcd, call: Callable[[Any], Call]) -> None:
        self._etcd, self._call = etcd, call
        self._ends: list[Callable[[], None]] = []
        self._ended = False
        loop: Any = asyncio.get_running_loop()
        self._replies = asyncio.Queue[Any]()
        self._wire = Wire(etcd.agenda, loop, etcd.latency_s)

    async def read(self, requests: Any, serialize: Callable[[Any], bytes]) -> None:
        """Do what the process asks for; etcd ends the watch when its requests end."""
        async for request in requests:
            sent = pb.WatchRequest.FromString(serialize(request))
            self._etcd.calls.append(self._call(sent))
            self._ends.append(self._etcd.watch(self, sent.create_request))
        self.end(CLOSED)

    def deliver(self, reply: Any) -> None:
        """Send a reply, or the error that ends it all."""
        self._wire.send(partial(self._replies.put_nowait, reply))

    def end(self, error: AioRpcError) -> None:
        """End it for the process too, when it hears of it."""
        if not self._ended:
            self._ended = True
            for end in self._ends:
                end()
            self.deliver(error)

    async def __aiter__(self) -> AsyncIterator[Any]:
        while not isinstance(reply := await self._replies.get(), AioRpcError):
            yield reply
        raise _anew(reply)


def _anew(error: AioRpcError) -> AioRpcError:
    return AioRpcError(error.code(), (), (), details=error.details())

"""Headers, traces, a service's own decoder, models, failures and effects."""

import asyncio
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import orjson
import pika
import pydantic
import pytest
import structlog

from fakes.events import OutOfStock, Speechless, body
from fakes.world import World
from idempotent_consumer import Event, InvalidEvent, Publish, Put, Reject, Service, Settings
from idempotent_consumer.calls import Handler
from idempotent_consumer.event import Properties, check_headers
from idempotent_consumer.testing import InMemory
from idempotent_consumer.testing.loop import Loop

TRACE = {
    "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    "tracestate": "vendor=1",
    "baggage": "tenant=7",
}
ORDER_EVENT: Any = Event("1", "new_order", {"n": 1})
ORDER = {"id": "1", "type": "new_order", "args": {"n": 1}}


def service(handle: Any = lambda _event: None, **options: Any) -> Service:
    made = Service("billing", noun="invoices", **options)
    made.handler("new_order")(handle)
    return made


def published(made: Service, *messages: Any, **properties: Any) -> InMemory:
    """Return a world in which a service has received these."""
    world = InMemory(made)
    world.publish(*messages, **properties)
    return world


def out_of_stock(*_: object) -> None:
    raise OutOfStock("pen")


def speechless(*_: object) -> None:
    raise Speechless


def leaving(*_: object) -> None:
    sys.exit("no")


# Headers.


def test_a_handler_gets_only_the_messages_own_headers() -> None:
    seen: list[Mapping[str, Any]] = []
    world = InMemory(service(lambda event: seen.append(event.headers)))
    own = {"tenant": "a", "n": 7, "x-request-id": "b", "list": [1]}
    ours = {"x-attempts": 1, "x-replays": 2, "x-error": "", "x-reason": "", "x-parked-at": ""}
    brokers = {"x-death": [], "x-delivery-count": 3, "x-first-death-queue": "q", "CC": ["q"]}
    world.publish(ORDER, headers={**own, **ours, **brokers})
    world.publish({**ORDER, "id": "2"})
    assert seen == [own, {}]
    with pytest.raises(TypeError):
        seen[0]["tenant"] = "b"  # type: ignore[index]


def test_a_trace_continues_in_retries_and_in_what_is_published() -> None:
    failures, seen = iter([ValueError("no"), None]), list[Mapping[str, Any]]()

    def handle(event: Event) -> list[Publish]:
        seen.append(event.headers)
        if failure := next(failures):
            raise failure
        return [Publish("billed", headers={"tenant": 7, "baggage": "own=1"}), Publish("sent")]

    world = InMemory(service(handle))
    world.publish(ORDER, headers={**TRACE, "secret": "b"})
    assert seen == [{**TRACE, "secret": "b"}] * 2
    assert world.published_headers == [{**TRACE, "tenant": 7, "baggage": "own=1"}, TRACE]


@pytest.mark.parametrize("value", [7, b"\xff", ["a"], "ä" * 5000])
def test_a_malformed_trace_header_is_not_passed_on(value: object) -> None:
    """A large one would leave no room for the handler's own headers."""
    headers = {"traceparent": value, "baggage": "a=1"}
    world = published(service(lambda _event: Publish("billed")), ORDER, headers=headers)
    assert world.published_headers == [{"baggage": "a=1"}]


def test_a_trace_continues_in_what_is_published_after_a_crash() -> None:
    seen = set()
    for dies_at in range(1, 12):
        world = InMemory(service(lambda _event: Publish("billed")), dies_at=dies_at)
        world.publish(ORDER, headers=TRACE)
        assert all(headers == TRACE for headers in world.published_headers), world.steps
        seen.add(len(world.published))
    assert seen == {1, 2}, "a crash between its confirm and the record publishes it again"


@pytest.mark.parametrize(
    "headers",
    [
        *({name: "a"} for name in ("", "a" * 256, "x-attempts", "x-death", "CC", 7)),
        *({"a": value} for value in (2**63, 1.5, None, ["b"], "\ud800", "b" * 33_000)),
    ],
)
def test_a_header_that_cannot_be_sent_is_the_handlers_failure(headers: dict[Any, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        check_headers(headers)
    world = published(service(lambda _event: Publish("billed", headers=headers)), ORDER)
    assert [parked.reason for parked in world.parked] == ["failed"]


# Logs.


def test_log_lines_of_a_handler_have_its_event_and_no_other() -> None:
    bound: list[dict[str, Any]] = []
    made = Service("billing", noun="invoices")

    def note() -> None:
        bound.append(structlog.contextvars.get_contextvars())

    def note_and_bind() -> None:
        note()
        structlog.contextvars.bind_contextvars(step="the handler's own")

    made.handler("pure")(lambda _event: note_and_bind())
    made.claimed_handler("thread", timeout_s=5)(lambda _event, _timeout_s: note_and_bind())

    @made.claimed_handler("coroutine", timeout_s=5)
    async def call(_event: Event, _timeout_s: float) -> None:
        note_and_bind()
        raise Reject("no")

    world = InMemory(made)
    for kind in ("pure", "thread", "coroutine"):
        world.publish({"id": "1" + kind, "type": kind}, headers=TRACE)
        note()
    world.publish({"id": "2", "type": "pure"}, headers={"traceparent": "none"})
    trace = {"trace_id": TRACE["traceparent"][3:35]}
    assert bound == [
        {"event_id": "1pure", "type": "pure", **trace},
        {},
        {"event_id": "1thread", "type": "thread", **trace},
        {},
        {"event_id": "1coroutine", "type": "coroutine", **trace},
        {},
        {"event_id": "2", "type": "pure"},
    ]


def test_the_line_of_an_outcome_has_the_id_of_its_trace() -> None:
    with World() as world:
        process = world.start()
        properties = pika.BasicProperties(headers=dict(TRACE))
        process.deliver(orjson.dumps(ORDER), orjson.dumps(ORDER), properties=properties)
        lines = process.logged("processed") + process.logged("skipped: a duplicate")
        assert [line["trace_id"] for line in lines] == [TRACE["traceparent"][3:35]] * 2


# A service's own decoder.


def text(message: bytes, properties: Properties) -> Event:
    """Decode ``ID TEXT``; the type is the message's."""
    event_id, _, rest = message.decode().partition(" ")
    if not event_id:
        raise InvalidEvent("no id")
    if rest == "bug":
        raise KeyError("bug")
    return Event(event_id, properties.type or "", {"text": rest})


def test_a_decoder_makes_the_event() -> None:
    seen: list[Event] = []
    messages, own = (b"1 a", b"1 a", b"1 b", b" c"), {"tenant": "a"}
    world = published(service(seen.append, decode=text), *messages, type="new_order", headers=own)
    assert [(event.id, event.args, event.headers) for event in seen] == [
        ("1", {"text": "a"}, {"tenant": "a"})
    ]
    assert [(parked.body, parked.reason) for parked in world.parked] == [
        (b" c", "invalid"),
        (b"1 b", "conflict"),
    ]


WRONG_EVENTS = [
    {"id": "1"},
    ORDER_EVENT._replace(id=""),
    ORDER_EVENT._replace(type=7),
    ORDER_EVENT._replace(args=None),
    ORDER_EVENT._replace(args={"a": object()}),
    ORDER_EVENT._replace(args={1: 2}),
]


@pytest.mark.parametrize(
    "decode",
    [
        text,
        out_of_stock,
        speechless,
        leaving,
        *(lambda *_, event=event: event for event in WRONG_EVENTS),
    ],
)
def test_a_message_whose_decoder_fails_waits_for_a_later_version(decode: Any) -> None:
    with World() as world:
        process = world.start({"new_order": Handler(lambda _event: None)}, decode=decode)
        process.deliver(b"1 bug")
        (held,) = process.forwarded
        assert (held.routing_key, held.headers) == ("order.retry.60s", {"x-attempts": 0})
        (line,) = process.logged("failed: it comes back later")
        assert line["error"].startswith("decode raised")
        assert process.counts() == {"received": 1, "retried": 1}


@pytest.mark.parametrize(
    "message", [b"x" * (1024 * 1024 + 1), "1 \ud800".encode(errors="surrogatepass")]
)
def test_a_large_body_or_text_that_is_not_utf8_is_parked_with_any_decoder(message: bytes) -> None:
    def decode(message: bytes, _properties: Properties) -> Event:
        return Event("1", "new_order", {"text": message.decode(errors="surrogatepass")})

    world = published(service(decode=decode), message)
    assert [parked.reason for parked in world.parked] == ["invalid"]


class Mute(InvalidEvent):
    """An InvalidEvent whose text cannot be read."""

    __str__ = Speechless.__str__


@pytest.mark.parametrize(
    ("invalid", "says"),
    [
        (InvalidEvent("unknown kind \ud800"), "unknown kind ?"),
        (InvalidEvent("two\nlines"), "two lines"),
        (InvalidEvent("ä" * 200_000), "ä" * 500),  # A frame takes 128 KiB.
        (Mute(), "Mute"),
    ],
)
def test_what_a_decoder_says_about_an_invalid_message_is_cut_to_fit_in_a_header(
    invalid: InvalidEvent, says: str
) -> None:
    def decode(_message: bytes, _properties: Properties) -> Event:
        raise invalid

    world = published(service(decode=decode), b"x")
    assert [(parked.reason, parked.error) for parked in world.parked] == [("invalid", says)]


# Models.


@dataclass
class Order:
    n: int


class Validated(pydantic.BaseModel):
    n: int


class Converted(msgspec.Struct):
    n: int


def converted(args: dict[str, Any]) -> Converted:
    return msgspec.convert(args, Converted)


@pytest.mark.parametrize("model", [Order, Validated, Validated.model_validate, converted])
@pytest.mark.parametrize("claimed", [False, True])
def test_a_handler_gets_what_its_model_makes_of_the_args(model: Any, *, claimed: bool) -> None:
    """An event that the model rejects is parked at once, as invalid."""
    made, seen = Service("billing", noun="invoices"), list[tuple[str, int]]()
    if claimed:

        @made.claimed_handler("new_order", timeout_s=5, model=model)
        async def call(event: Event, order: Any, timeout_s: float) -> None:
            assert timeout_s == 5
            seen.append((event.id, order.n))
    else:
        made.handler("new_order", model=model)(lambda event, o: seen.append((event.id, o.n)))
    world = published(made, ORDER, {"id": "2", "type": "new_order", "args": {"other": 1}})
    assert seen == [("1", 1)]
    (parked,) = world.parked
    assert parked.reason == "invalid"
    assert "Error: " in parked.error
    assert world.counts["invalid"] == 1
    assert world.counts["retried"] == 0


def test_a_model_that_fails_does_not_open_the_circuit_breaker() -> None:
    made, seen = Service("billing", noun="invoices"), list[str]()
    made.claimed_handler("new_order", timeout_s=5, model=Order)(
        lambda event, _order, _timeout_s: seen.append(event.id)
    )
    world = InMemory(made, Settings(enable_etcd=True, breaker_failures=1))
    world.publish({"id": "1", "type": "new_order"}, {**ORDER, "id": "2"})
    assert (seen, [parked.reason for parked in world.parked]) == (["2"], ["invalid"])


# Failures.


def test_an_exception_is_logged_with_its_line_and_only_the_handlers_frames() -> None:
    def price(currency: str) -> int:
        return {"USD": 1}[currency]

    with World() as world:
        process = world.start({"new_order": Handler(lambda _event: price("EUR"))})
        process.deliver(body("1"))
        (first,) = process.logged("failed: it comes back later")
        line = price.__code__.co_firstlineno + 1
        assert first["error"] == f"KeyError: 'EUR' (test_messages.py:{line})"
        frames = []
        traceback = first["exc_info"].__traceback__
        while traceback:
            frames.append(traceback.tb_frame.f_code.co_name)
            traceback = traceback.tb_next
        assert frames == ["<lambda>", "price"]
        process.advance(1.0)
        _, second = process.logged("failed: it comes back later")
        assert "exc_info" not in second


@pytest.mark.parametrize("way", ["pure", "thread", "coroutine"])
@pytest.mark.parametrize(
    ("fail", "says"),
    [
        (out_of_stock, "OutOfStock: pen (test_messages.py:"),
        (speechless, "Speechless (test_messages.py:"),
    ],
)
def test_an_exception_that_is_hard_to_describe_is_a_failure_like_any_other(
    way: str, fail: Any, says: str
) -> None:
    async def call(event: Event, _timeout_s: float) -> None:
        fail(event)

    made = Service("billing", noun="invoices")
    if way == "pure":
        made.handler("new_order")(fail)
    else:
        made.claimed_handler("new_order", timeout_s=5)(call if way == "coroutine" else fail)
    world = published(made, ORDER)
    assert [(parked.reason, parked.error[: len(says)]) for parked in world.parked] == [
        ("failed", says)
    ]


FINISHED: asyncio.Future[None] = Loop().create_future()
FINISHED.set_result(None)
NOTHING_OF_OURS = "must not be empty or begin with /service/ or /incarnation/"
WRONG_EFFECTS: list[tuple[Any, str]] = [
    (True, "a handler returned True: return a Put, a Publish, an iterable of these, or None"),
    ({"id": "1"}, "a handler returned {'id': '1'}: return a Put"),
    ("text", "a handler returned 'text': return a Put"),
    (FINISHED, ": what wraps an async def has to be async def too"),
    ([b"x"], "a handler returned b'x' among its effects: return a Put"),
    (Put("/a", "text"), "a Put's value is bytes, not 'text': write value.encode()"),  # type: ignore[arg-type]
    (Put("/a", 7), "a Put's value is bytes, not 7"),  # type: ignore[arg-type]
    (Put(7, b""), "a Put's key is a str, not 7"),  # type: ignore[arg-type]
    (Put("", b""), NOTHING_OF_OURS),
    (Put("/service/order/2", b""), NOTHING_OF_OURS),
    (Put("/incarnation/order", b""), NOTHING_OF_OURS),
    (Put("\ud800", b""), "UnicodeEncodeError"),
    ([Put("/a", b""), Put("/a", b"")], "two effects of one event have the same key"),
    (Put("/a", b"x" * 2_000_000), "bytes"),
    ([Put(f"/a/{n}", b"") for n in range(200)], "ETCD_MAX_TXN_OPS"),
    (Publish(""), "type is not a non-empty string"),
    (Publish(7), "type"),  # type: ignore[arg-type]
    (Publish("t", [1]), "dictionary"),  # type: ignore[arg-type]
    (Publish("t", {1: "a"}), "TypeError"),  # type: ignore[dict-item]
    (Publish("t", {"a": object()}), "TypeError"),
    (Publish("t", {"a": "\ud800"}), "TypeError"),
    (Publish("t", {"a": "x" * 1_100_000}), "bytes"),
]


@pytest.mark.parametrize(("returned", "says"), WRONG_EFFECTS)
def test_wrong_effects_are_the_handlers_failure(returned: object, says: str) -> None:
    """The event is retried and parked. Only its batch mates are recorded in etcd."""
    world = InMemory(service(lambda event: returned if event.id == "bad" else None))
    world.publish(ORDER, {**ORDER, "id": "bad"}, {**ORDER, "id": "2"})
    assert [says in parked.error for parked in world.parked] == [True]
    assert world.counts == {"received": 6, "processed": 2, "retried": 3, "failed": 1}
    assert (world.records, world.effects) == ({"1": "done", "2": "done"}, {})

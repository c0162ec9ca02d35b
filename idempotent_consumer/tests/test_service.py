"""What a service refuses when it is made, and when it starts."""

import math
import threading
from decimal import Decimal
from functools import partial
from typing import Any

import pytest

from fakes.events import body
from fakes.world import World
from idempotent_consumer import Event, Service
from idempotent_consumer.calls import Handler
from idempotent_consumer.service import real_system
from idempotent_consumer.testing import InMemory


@pytest.fixture
def service() -> Service:
    return Service("order", noun="orders")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"name": "Order"}, "service name"),
        *(({"noun": noun}, "noun") for noun in ("", "my orders", "orders:1|c", "orders.eu", "ñs")),
        ({"exchange": ""}, "exchange"),
        ({"exchange": "amq.topic"}, "amq."),
        ({"exchange": "a" * 256}, "exchange"),
        ({"exchange": None}, "exchange"),
        ({"bindings": "order.#"}, "list of keys"),
        ({"bindings": []}, "list of keys"),
        ({"bindings": ["a" * 256]}, "255"),
        ({"bindings": [None]}, "bindings"),
        ({"bindings": iter(())}, "list of keys"),
        ({"decode": "json"}, "decode is a function"),
    ],
)
def test_what_a_service_cannot_be_made_with(options: dict[str, Any], says: str) -> None:
    with pytest.raises((ValueError, TypeError), match=says):
        Service(**{"name": "order", "noun": "orders", **options})


def test_any_iterable_of_settings_is_read_once(service: Service) -> None:
    """A generator that was checked would be empty: no event would come, or be retried."""
    assert Service("order", "orders", bindings=(key for key in ["a", "b"])).bindings == ("a", "b")  # type: ignore[arg-type]
    service.handler("new_order", retry_delays=(text for text in ["1s"]))(returns_nothing)  # type: ignore[call-overload]
    assert service.handlers["new_order"].retry_delays == (("1s", 1),)


def test_a_type_has_one_handler(service: Service) -> None:
    service.handler("new_order")(lambda _event: None)
    with pytest.raises(ValueError, match="new_order"):
        service.claimed_handler("new_order", timeout_s=5.0)(lambda _event, _timeout_s: None)


def test_a_service_that_runs_takes_no_more_handlers() -> None:
    """For instance from a module that a handler imports. Their retry queues would be missing."""

    def handle(_event: Event) -> None:
        process.service.claimed_handler("late", timeout_s=5)(call)

    with World() as world:
        process = world.start(Handler(handle))
        process.deliver(body("1"))
        errors = [line["error"] for line in process.logged("failed: it comes back later")]
    assert [error[:31] for error in errors] == ["RuntimeError: the service runs:"]


def test_a_time_out_may_be_any_number(service: Service) -> None:
    service.claimed_handler("new_order", timeout_s=Decimal(5))(call)  # type: ignore[call-overload]
    world = InMemory(service)
    world.publish({"id": "1", "type": "new_order"})
    assert world.counts["processed"] == 1


def test_a_decorator_without_a_type(service: Service) -> None:
    """It would register nothing, so every event would be ignored."""
    with pytest.raises(TypeError, match="event type"):
        service.handler(call)  # type: ignore[call-overload]


def test_if_the_system_has_no_more_threads_a_job_waits_for_one_that_is_there() -> None:
    """An error would end the process, while the job is queued and still makes its call."""
    threads, going_on = real_system().threads(2), threading.Event()
    first = threads.submit(going_on.wait, 10)
    before = threading.stack_size(2**47)  # More than there are addresses: no thread can start.
    try:
        second = threads.submit(threading.get_ident)
    finally:
        threading.stack_size(before)
    going_on.set()
    assert (first.result(10), second.result(10) != threading.get_ident()) == (True, True)
    threads.shutdown()


def call(event: Event, timeout_s: float) -> None: ...


async def wait(event: Event, timeout_s: float) -> None: ...


class Plain:
    def __call__(self, event: Event, timeout_s: float) -> None: ...


class Waiting:
    async def __call__(self, event: Event, timeout_s: float) -> None: ...

    async def wait(self, event: Event, timeout_s: float) -> None: ...


@pytest.mark.parametrize(
    ("function", "is_coroutine"),
    [
        (call, False),
        (wait, True),
        (partial(call), False),
        (partial(wait), True),
        (Plain(), False),
        (Waiting(), True),
        (Waiting().wait, True),
        (staticmethod(wait), True),
        (lambda *_: None, False),
        (max, False),  # A function written in C may have no signature.
    ],
)
def test_a_claimed_handler_is_plain_or_a_coroutine(
    service: Service, function: Any, is_coroutine: bool
) -> None:
    """Or a callable object. If a coroutine were missed, it would never be awaited."""
    assert service.claimed_handler("new_order", timeout_s=5.0)(function) is function
    handler = service.handlers["new_order"]
    assert (handler.claimed, handler.is_coroutine) == (True, is_coroutine)


def test_a_wrong_setting_or_no_handler_ends_it_with_one_line_and_code_2(
    service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a handler it would ack and ignore every event."""
    assert service.run({}) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("order: it has no handler")
    service.handler("new_order")(lambda _event: None)
    assert service.run({"BATCH_SIZE": "none"}) == 2
    expected = "order: BATCH_SIZE is 'none': write a whole number from 1 to 4096\n"
    assert capsys.readouterr() == ("", expected)


def returns_nothing(_event: Event) -> None: ...


def takes_two(_event: Event, _order: object) -> None: ...


def takes_a_keyword(_event: Event, *, limit: int) -> None: ...


@pytest.mark.parametrize(
    ("options", "function", "says"),
    [
        ({}, wait, "async def"),
        ({"retries": 3}, returns_nothing, "'retries'"),
        *(({"timeout_s": no_time}, call, "timeout_s") for no_time in (0, -1.0, math.inf, math.nan)),
        ({"timeout_s": 3_000_000_001}, call, "more than 0 and at most 3,000,000,000"),
        ({"timeout_s": 5, "at_once": 0}, call, "at_once is 0: write a whole number from 1"),
        ({"timeout_s": 5, "at_once": 2.5}, call, "at_once is 2.5: write a whole number from 1"),
        ({"timeout_s": 5, "retry_delays": [1, 60]}, call, "retry_delays is [1, 60]: write a list"),
        ({"timeout_s": 5, "retry_delays": ["soon"]}, call, "write a whole number and a unit"),
        ({"timeout_s": 5, "retry_delays": "1s"}, call, "retry_delays is '1s': write a list"),
        ({}, takes_two, "_order: object) -> None cannot be called with (event): missing a"),
        ({}, takes_a_keyword, "with (event): missing a required"),
        ({}, lambda: None, "<lambda>() cannot be called with (event): too many positional"),
        ({"model": dict}, returns_nothing, "with (event, model): too many positional"),
        ({"timeout_s": 5}, returns_nothing, "with (event, timeout_s): too many positional"),
        ({"timeout_s": 5, "model": dict}, call, "with (event, model, timeout_s): too many"),
        ({"timeout_s": 5, "model": 7}, call, "model is a class, or a function"),
        ({}, None, "None is not a callable object"),
        ({}, property(), "is not a callable object"),
    ],
)
def test_what_cannot_be_registered_is_refused_in_one_line(
    service: Service, options: dict[str, Any], function: Any, says: str
) -> None:
    register: Any = service.claimed_handler if "timeout_s" in options else service.handler
    with pytest.raises((TypeError, ValueError)) as raised:
        register("new_order", **options)(function)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)
    assert service.handlers == {}

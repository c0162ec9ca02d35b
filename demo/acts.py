"""The five acts. Each can be played alone: it first starts both services as it needs them."""

from collections.abc import Callable

from demo.play import Change, Play
from demo.stage import SERVICES, Setup

Act = Callable[[Play], None]

_TIMES = 3
_CALLS = 30
"""More than the consecutive failures that open the circuit breaker."""

_CRASH_POINT = "reply read:1"
"""etcd has answered that the first batch is recorded, and nothing is acked yet."""

_REPLICAS = 3


def both_consume(play: Play) -> None:
    play.screen.heading(
        "Act 1: one event, two services",
        "The producer knows neither: each service has a queue of its own and gets its copy.",
    )
    play.run_services(Setup())
    play.publish("order-1")
    play.expect(
        Change("order consumes it", "orders_processed", 1),
        Change("notify consumes it", "notifications_processed", 1),
    )


def notify_is_down(play: Play) -> None:
    play.screen.heading(
        "Act 2: notify is down, and nothing is lost",
        "Producer and order do not notice, and nobody has to repair anything afterwards.",
    )
    play.run_services(Setup())
    play.do(play.stage.stop("notify"))
    play.publish("order-2", text="as above, with the id order-2")
    play.expect(Change("order consumes it", "orders_processed", 1))
    play.expect_waiting("notify", 1, "the queue notify keeps 1 event for it")
    play.expect(Change("notify does not", "notifications_processed", 0))
    play.do(play.stage.start("notify"))
    play.expect(Change("notify is back and consumes it", "notifications_processed", 1))


def the_same_again(play: Play) -> None:
    play.screen.heading(
        "Act 3: the same event, again and again",
        "Brokers and producers repeat an event whenever they cannot know that it has arrived.",
    )
    play.run_services(Setup())
    play.screen.say("Without etcd every repetition is processed:")
    play.publish(*["order-3"] * _TIMES, text=f"the id order-3, {_TIMES} times")
    play.expect(
        Change("order places it three times", "orders_processed", _TIMES),
        Change("notify sends it three times", "notifications_processed", _TIMES),
        Change("order skips nothing", "orders_processed_skipped", 0),
        Change("notify skips nothing", "notifications_processed_skipped", 0),
    )
    play.screen.say("With etcd the first is recorded, and the others are skipped:")
    play.run_services(Setup(enable_etcd=True))
    play.publish(*["order-3"] * _TIMES, text=f"the id order-3, {_TIMES} times")
    play.expect(
        Change("order places it once", "orders_processed", 1),
        Change("order skips the others", "orders_processed_skipped", _TIMES - 1),
        Change("notify sends it once", "notifications_processed", 1),
        Change("notify skips the others", "notifications_processed_skipped", _TIMES - 1),
    )
    play.screen.say("After a restart it is still known, and skipped at once:")
    play.do(play.stage.restart_services())
    play.publish("order-3", text="the id order-3, once more")
    play.expect(
        Change("order skips it", "orders_processed_skipped", 1),
        Change("notify skips it", "notifications_processed_skipped", 1),
        Change("order places nothing", "orders_processed", 0),
        Change("notify sends nothing", "notifications_processed", 0),
    )


def the_receiver_is_down(play: Play) -> None:
    play.screen.heading(
        "Act 4: the receiver is down, and nothing is parked",
        "notify calls a receiver over HTTP. Retries alone would park each event after 71 s.",
    )
    play.run_services(Setup(enable_etcd=True, calls=True))
    first, *others = (f"order-{number}" for number in range(4, 5 + _CALLS))
    play.publish(first, text=f"as above, with the id {first}")
    play.expect(
        Change("order consumes it", "orders_processed", 1),
        Change("notify calls the receiver for it", "notifications_processed", 1),
    )
    play.do(play.stage.stop("receiver"))
    play.publish(*others, text=f"the ids {others[0]} to {others[-1]}")
    play.expect(Change("order consumes them", "orders_processed", _CALLS))
    play.expect_breaker("calls fail, and notify's circuit breaker opens", is_open=True)
    play.expect(Change("notify holds them", "notifications_processed", 0))
    play.expect_waiting("notify.dead-letter", 0, "nothing is parked")
    play.do(play.stage.start("receiver"))
    play.expect_breaker("the next call succeeds, and the circuit breaker closes", is_open=False)
    play.expect(Change("notify calls for all of them", "notifications_processed", _CALLS))
    play.expect_called([first, *others])


def killed_then_three(play: Play) -> None:
    play.screen.heading(
        "Act 5: a kill between record and ack, then three replicas",
        "An event comes again, perhaps to another replica, and each order is still placed once.",
    )
    play.run_services(Setup(enable_etcd=True))
    event_id, *event_ids = (f"order-{number}" for number in range(5 + _CALLS, 6 + 2 * _CALLS))
    play.screen.say("order kills itself when etcd has recorded the event, before it acks it:")
    play.do(play.stage.crash_at(_CRASH_POINT, "order"))
    play.publish(event_id, text=f"the id {event_id}")
    play.expect_killed("order")
    play.expect_orders([event_id], "the order is placed")
    play.expect_waiting("order", 1, "nobody has acked the event: it is in the queue order again")
    play.do(play.stage.start("order"))
    play.expect(
        Change("order is back and skips it", "orders_processed_skipped", 1),
        Change("order places nothing", "orders_processed", 0),
        Change("notify sends it once", "notifications_processed", 1),
    )
    play.expect_orders([event_id], "the order was placed once")
    play.screen.say(
        "Three replicas share a queue: the copies of an event reach two of them at once:"
    )
    play.run_services(Setup(enable_etcd=True, replicas=_REPLICAS))
    for service in SERVICES:
        play.expect_consumers(service, _REPLICAS)
    text = f"the ids {event_ids[0]} to {event_ids[-1]}, each twice"
    play.publish(*(event_id for event_id in event_ids for _ in range(2)), text=text)
    play.expect(
        Change("order places each once", "orders_processed", len(event_ids)),
        Change("order skips the others", "orders_processed_skipped", len(event_ids)),
        Change("notify sends each once", "notifications_processed", len(event_ids)),
        Change("notify skips the others", "notifications_processed_skipped", len(event_ids)),
    )
    play.expect_orders(event_ids, "each order was placed once")


ACTS: dict[str, Act] = {
    "1": both_consume,
    "2": notify_is_down,
    "3": the_same_again,
    "4": the_receiver_is_down,
    "5": killed_then_three,
}
"""The acts by their numbers."""

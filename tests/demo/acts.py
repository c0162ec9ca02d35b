"""The three acts."""

from demo.play import Change, Play

_TIMES = 3


def play_all(play: Play) -> None:
    """Play the acts in order; each begins where the one before has ended.

    Raises what the first failure raises: what comes after it would only fail as well.
    """
    both_consume(play)
    notify_is_down(play)
    duplicates_without_etcd(play)
    duplicates_with_etcd(play)


def both_consume(play: Play) -> None:
    """Act 1: an event reaches both services."""
    play.screen.heading(
        "Act 1: one event, two services",
        "The producer knows neither: each service has a queue of its own and gets its copy.",
    )
    play.do(play.stage.run_services(enable_etcd=False))
    play.expect_zeros()
    play.do(play.stage.publish("order-1"))
    play.expect(
        Change("order consumes it", "orders_processed", 1),
        Change("notify consumes it", "notifications_processed", 1),
    )


def notify_is_down(play: Play) -> None:
    """Act 2: an event waits for the service that is down."""
    play.screen.heading(
        "Act 2: notify is down, and nothing is lost",
        "Producer and order do not notice, and nobody has to repair anything afterwards.",
    )
    play.do(play.stage.stop("notify"))
    play.publish_as_before("order-2", "as above, with the id order-2")
    play.expect(Change("order consumes it", "orders_processed", 1))
    play.expect_waiting("notify", 1)
    play.expect(Change("notify does not", "notifications_processed", 0))
    play.do(play.stage.start("notify"))
    play.expect(Change("notify is back and consumes it", "notifications_processed", 1))


def duplicates_without_etcd(play: Play) -> None:
    """Act 3, first half: a duplicate is processed again."""
    play.screen.heading(
        "Act 3: the same event, again and again",
        "Brokers and producers repeat an event whenever they cannot know that it has arrived.",
    )
    play.screen.say("Without etcd every repetition is processed:")
    play.publish_as_before("order-3", f"the id order-3, {_TIMES} times", _TIMES)
    play.expect(
        Change("order places it three times", "orders_processed", _TIMES),
        Change("notify sends it three times", "notifications_processed", _TIMES),
        Change("order skips nothing", "orders_processed_skipped", 0),
        Change("notify skips nothing", "notifications_processed_skipped", 0),
    )


def duplicates_with_etcd(play: Play) -> None:
    """Act 3, second half: a duplicate is skipped, also by a service that has just started."""
    play.screen.say("With etcd the first is recorded, and the others are skipped:")
    play.do(play.stage.run_services(enable_etcd=True))
    play.publish_as_before("order-3", f"the id order-3, {_TIMES} times", _TIMES)
    play.expect(
        Change("order places it once", "orders_processed", 1),
        Change("order skips the others", "orders_processed_skipped", _TIMES - 1),
        Change("notify sends it once", "notifications_processed", 1),
        Change("notify skips the others", "notifications_processed_skipped", _TIMES - 1),
    )
    play.screen.say("After a restart it is still known, and skipped at once:")
    play.do(play.stage.restart_services())
    play.publish_as_before("order-3", "the id order-3, once more")
    play.expect(
        Change("order skips it", "orders_processed_skipped", 1),
        Change("notify skips it", "notifications_processed_skipped", 1),
        Change("order places nothing", "orders_processed", 0),
        Change("notify sends nothing", "notifications_processed", 0),
    )

"""Test your own handlers without a server: in memory, with duplicates, and killed at each step.

In a test of yours::

    from idempotent_consumer.testing import InMemory, check_crashes, check_duplicates

    def test_an_order_is_placed() -> None:
        world = InMemory(service)
        world.publish({"id": "1", "type": "new_order"})
        assert world.effects == {"/orders/1": b"placed"}

    def test_nobody_sees_a_repeat() -> None:
        check_duplicates(make, events)
        check_crashes(make, events)
"""

from .world import InMemory, Parked, Receiver, check_crashes, check_duplicates

__all__ = ["InMemory", "Parked", "Receiver", "check_crashes", "check_duplicates"]

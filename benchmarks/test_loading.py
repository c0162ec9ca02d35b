"""The series of events that consumers are given."""

from collections import Counter

from .loading import Mix, series


def test_a_shuffled_series_has_each_event_twice_in_the_same_order_each_time() -> None:
    """Ids are fresh each time, so the order shows in where the first of each comes again."""
    one, other = (series(Mix.SHUFFLED, 100) for _ in range(2))

    for bodies, events in (one, other):
        assert len(bodies) == 100
        assert list(Counter(bodies).values()) == [2] * events == [2] * 50
    assert distances(one[0]) == distances(other[0])
    assert len(set(distances(one[0]))) > 10


def test_a_repeated_series_comes_as_a_whole_behind_itself() -> None:
    bodies, events = series(Mix.REPEATED, 10)

    assert events == 10
    assert bodies[:10] == bodies[10:]
    assert len(set(bodies)) == 10


def test_a_fresh_series_has_no_event_twice() -> None:
    bodies, events = series(Mix.FRESH, 10)

    assert events == len(bodies) == len(set(bodies)) == 10


def distances(bodies: list[bytes]) -> list[int]:
    """Return how far behind its first arrival each event comes again."""
    return [
        bodies.index(body, place + 1) - place
        for place, body in enumerate(bodies)
        if bodies.index(body) == place
    ]

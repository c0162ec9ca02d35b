"""The account of calls to the outside: whom was called for, how often, and why again."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import combinations, pairwise

from chaos.timed_sink import Span
from integration.judging import lines
from servers.services import Service

Explains = Callable[[Span, Span], bool]


def account(spans: Iterable[Span], done: set[str], explains: Explains) -> set[str]:
    """Return the ids that were called for more than once.

    Raises AssertionError where an event was not called for, where two calls for one were under
    way at the same time, and where `explains` knows no cause of a repeat from the call before it.
    """
    by_id: defaultdict[str, list[Span]] = defaultdict(list)
    for span in sorted(spans, key=lambda span: span.began_s):
        by_id[span.key].append(span)
    assert set(by_id) == done, f"not called: {done - set(by_id)}, not done: {set(by_id) - done}"
    calls = by_id.values()
    overlapping = [pair for each in calls for pair in combinations(each, 2) if _overlap(*pair)]
    assert not overlapping, f"at the same time: {overlapping}"
    unexplained = [pair for each in calls for pair in pairwise(each) if not explains(*pair)]
    assert not unexplained, f"without a cause: {unexplained}"
    return {event_id for event_id, each in by_id.items() if len(each) > 1}


def _overlap(first: Span, second: Span) -> bool:
    return first.overlaps(second)


def lost_claims(service: Service) -> set[str]:
    """Return the ids for which a service has logged that a claim was lost during the call."""
    return {line["event_id"] for line in lines(service, "the claim was lost during the call")}

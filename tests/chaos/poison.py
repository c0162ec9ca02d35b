"""Bodies that are no events, mixed into a trial: each is parked, whatever happens meanwhile."""

from chaos.trial import Trial
from integration.judging import wait_drained


class Poison:
    """What has been injected into one service's queue, to be found in its dead-letter queue."""

    def __init__(self, attempt: Trial) -> None:
        self._attempt = attempt
        self._sent: set[bytes] = set()

    def inject(self) -> None:
        """Publish one more; raises pika's errors where the broker does not take it."""
        body = b"not json: %d" % len(self._sent)
        self._attempt.broker.publish_raw(body)
        self._sent.add(body)

    def assert_parked(self) -> None:
        """Drain both queues; raise AssertionError unless all of it, and nothing else, is parked.

        A second copy is none of the service's faults where it was killed, or a confirm was lost,
        between the parking and the ack: what is compared is the set of bodies.
        """
        broker, service = self._attempt.broker, self._attempt.service
        wait_drained(broker, service)
        parked = broker.drain(f"{service}.dead-letter")
        assert {message.body for message in parked} == self._sent
        assert {message.headers["x-reason"] for message in parked} <= {"invalid"}

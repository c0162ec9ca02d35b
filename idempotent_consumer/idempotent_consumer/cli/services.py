"""Which services there are, and the queues of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from .. import names
from .context import Context
from .errors import CommandError
from .web import WebError

_TWIN = names.dead_letter_queue("")


class Queues(NamedTuple):
    """What RabbitMQ's management API says of all queues, by name: its facts, seconds old.

    ``why_not`` is why it could not be asked; there are no facts then.
    """

    facts: Mapping[str, Mapping[str, object]]
    why_not: str = ""


def queues(context: Context) -> Queues:
    """Ask the management API for the queues."""
    try:
        return Queues({str(queue["name"]): queue for queue in context.management().queues()})
    except WebError as error:
        return Queues({}, str(error))


def services(given: Sequence[str], found: Queues) -> list[str]:
    """Return the services given, or all that have a dead-letter queue. Raises CommandError."""
    if given:
        return list(given)
    if found.why_not:
        raise CommandError(f"{found.why_not}; or name the services")
    twins = [name.removesuffix(_TWIN) for name in found.facts if name.endswith(_TWIN)]
    return sorted(name for name in twins if name in found.facts)


def retry_queues(service: str, context: Context, found: Queues) -> dict[str, str]:
    """Return the retry queues by their delay: those of RETRY_DELAYS, and what others there are."""
    prefix = names.retry_queue(service, "")
    others = (name.removeprefix(prefix) for name in found.facts if name.startswith(prefix))
    delays: Iterable[str] = (*dict(context.settings.retry_delays), *others)
    return {delay: names.retry_queue(service, delay) for delay in delays}

"""One run of one consumer, from a full queue to an empty one."""

from functools import partial

from harness.servers import Servers
from harness.wait import eventually

from .loading import Loader, Mix, series
from .preparing import prepared
from .progress import Rates, follow, rate
from .records import Records
from .subjects import DUPLICATES, Subject


def run_once(servers: Servers, subject: Subject, events: int) -> Rates:
    """Preload the subject's queue, let it consume everything, and check what it has recorded."""
    bodies, recorded = series(subject.mix, events // subject.one_in)
    with prepared(servers, subject) as (channel, child):
        Loader(servers.rabbitmq.url, subject.queue, bodies).run()
        child.start()
        samples = follow(channel, subject.queue, child)
        records = Records(servers.etcd)
        for prefix in subject.records:
            # The queue is empty before the last batches are recorded.
            eventually(partial(records.require, prefix, recorded))
    prefetch = subject.prefetch
    if subject.mix is Mix.REPEATED:
        return {
            subject.name: rate(samples, recorded, behind=recorded, prefetch=prefetch),
            DUPLICATES: rate(samples, recorded, prefetch=prefetch),
        }
    return {subject.name: rate(samples, len(bodies), prefetch=prefetch)}

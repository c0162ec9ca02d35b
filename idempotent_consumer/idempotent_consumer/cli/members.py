"""etcd's members as an operator sees them: what each is, and what it allows."""

from __future__ import annotations

from typing import NamedTuple

from . import messages as m
from .etcd import EtcdError
from .reading import Asking


class Member(NamedTuple):
    """What the member that answers says of itself."""

    version: str
    size_bytes: int
    has_leader: bool


def member(etcd: Asking) -> Member:
    """Ask one member for its status. Raises EtcdError."""
    status = etcd.ask("Status", m.StatusRequest())
    return Member(status.version, int(status.dbSize), bool(status.leader))


def alarms(etcd: Asking) -> list[str]:
    """Return the names of the alarms that are on: NOSPACE, CORRUPT. Raises EtcdError."""
    raised = etcd.ask("Alarm", m.AlarmRequest(action=m.AlarmRequest.GET)).alarms
    return sorted({m.AlarmType.Name(each.alarm) for each in raised})


def takes_operations(etcd: Asking, operations: int, key: bytes) -> bool:
    """Return whether etcd takes so many operations in a transaction: each reads this key."""
    request = m.TxnRequest()
    for _ in range(operations):
        m.get(request.success, key)
    try:
        etcd.ask("Txn", request)
    except EtcdError as error:
        if "too many operations" in str(error):
            return False
        raise
    return True

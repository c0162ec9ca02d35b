"""etcd for an operator's command: requests that wait for a reply, from any of the members."""

from __future__ import annotations

from typing import Any

from .etcd import Etcd, EtcdError, Failure


class AskingEtcd(Etcd):
    """etcd's client for one question at a time, on the caller's thread."""

    def ask(self, method: str, request: Any) -> Any:
        """Send a request to one member after the other until one replies. Raises EtcdError.

        A request that failed may have applied, so it has to be one that can be sent twice.
        """
        for left in reversed(range(len(self._endpoints))):
            at = self._current
            try:
                return self.call_and_wait(method, request)
            except EtcdError as error:
                if not left or error.failure is not Failure.UNKNOWN:
                    raise EtcdError(error.failure, self._explain(at, error)) from None
        raise AssertionError("there is an endpoint at least")

    def _explain(self, at: int, error: EtcdError) -> str:
        host, port = self._addresses[at]
        refused = error.failure is Failure.AUTHENTICATION
        look_at = (
            "ETCD_USER and ETCD_PASSWORD say who asks"
            if refused
            else ("ETCD_ENDPOINTS says where it is")
        )
        return f"etcd at {host}:{port}: {error} ({look_at})"

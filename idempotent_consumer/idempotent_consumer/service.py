"""A service: its handlers, and the run that ties them to RabbitMQ and etcd."""

from __future__ import annotations

import gc
import inspect
import os
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from functools import partial

from .bus.bus import RabbitBus
from .bus.delivery import Delivery
from .bus.loop import PikaLoop
from .consumer import Consumer
from .handlers import ClaimedHandler, Handler, Pool, PureHandler
from .health import Health, HealthServer, PortTaken
from .ledger.cache import Cache
from .ledger.etcd import Etcd
from .ledger.importer import Importer
from .ledger.ledger import EtcdLedger, Ledger
from .ledger.off import NoLedger
from .log import Logs
from .metrics import SEND_EVERY_S, Metrics
from .names import check_noun, check_service_name, record_prefix
from .settings import Settings, SettingsError
from .tally import Tally

FINISH_WITHIN_S = 7.0
"""What is in hand at SIGTERM is finished and settled within this, or goes back to the broker."""

_CLOSE_WITHIN_S = 1.0
_EXIT_WITHIN_S = 9.5
_CALL_THREADS = 16
_TICK_S = 0.02


class Service:
    """A name, and a handler for each event type it consumes.

    ``noun`` is what the service counts: ``orders`` gives ``orders_processed`` and the others.
    """

    def __init__(self, name: str, noun: str) -> None:
        self.name, self.noun = check_service_name(name), check_noun(noun)
        self.handlers: dict[str, Handler] = {}

    def handler(self, event_type: str) -> Callable[[PureHandler], PureHandler]:
        """Register a pure handler: it returns effects, which are recorded with the event.

        It runs on the thread that keeps the heartbeats, so it computes and does not wait.
        """
        if not isinstance(event_type, str):
            raise TypeError('the event type is missing: write @service.handler("...")')

        def register(function: PureHandler) -> PureHandler:
            self._register(event_type, Handler(function))
            return function

        return register

    def claimed_handler(
        self, event_type: str, timeout_s: float
    ) -> Callable[[ClaimedHandler], ClaimedHandler]:
        """Register a handler with an effect outside: it runs under a claim, on a pool of threads.

        It is given ``timeout_s`` and returns or raises within it. Its effect happens at least
        once, so it hands the event's id on as an idempotency key.
        """
        if timeout_s <= 0:
            raise ValueError(f"timeout_s is {timeout_s}: write seconds, more than 0")

        def register(function: ClaimedHandler) -> ClaimedHandler:
            self._register(event_type, Handler(function, timeout_s))
            return function

        return register

    def run(self, environ: Mapping[str, str] = os.environ) -> int:
        """Run until SIGTERM or SIGINT, on the main thread, and end the process with code 0.

        Returns 2 for a wrong setting, or without a handler, after one line on standard error. An
        absent RabbitMQ or etcd is waited for.
        """
        if not self.handlers:
            print(
                f"{self.name}: it has no handler, so it would drop every event: register one "
                "with @service.handler before run()",
                file=sys.stderr,
            )
            return 2
        try:
            running = Running(self, Settings.from_environ(environ))
        except (SettingsError, PortTaken) as error:
            print(f"{self.name}: {error}", file=sys.stderr)
            return 2
        code = running.until_stopped()
        # Not by Python's own exit, which waits for name look-ups under way and for a standard
        # output that nobody reads.
        os._exit(code)

    def _register(self, event_type: str, handler: Handler) -> None:
        if event_type in self.handlers:
            raise ValueError(f"{event_type!r} has a handler already")
        if inspect.iscoroutinefunction(handler.function):
            raise TypeError("a handler is a plain function, not async def: a claimed one may wait")
        self.handlers[event_type] = handler


class Running:
    """One run of a service, from its settings to its exit code."""

    def __init__(self, service: Service, settings: Settings) -> None:
        # Blocked before any thread is made, they reach none but the one that waits for them.
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
        self._health = Health()
        self._logs = Logs(service.name, settings.log_level, settings.log_format)
        self._log = self._logs.logger
        self._metrics = Metrics(settings.statsd_host, settings.statsd_port, settings.statsd_prefix)
        self._loop = PikaLoop()
        self._ended = threading.Event()
        self._process = process = secrets.token_hex(16)
        timeouts_s = [h.timeout_s for h in service.handlers.values() if h.timeout_s is not None]
        tally = Tally(service.noun, self._metrics, self._log)
        if timeouts_s:
            tally.count("sent", 0)
        self._ledger = self._make_ledger(service, settings, max(timeouts_s, default=0.0))
        self._bus = RabbitBus(
            service.name, settings, self._loop, self._health, self._log, self._take, tally.returned
        )
        self._consumer = Consumer(
            service.name,
            process,
            service.handlers,
            settings.retry_delays,
            self._ledger,
            self._bus,
            self._loop,
            Pool(_CALL_THREADS if timeouts_s else 0),
            tally,
            self._log,
        )
        # Last: by now everything has said what it lacks.
        if settings.health_port:
            HealthServer(
                self._health, settings.health_port, lambda: self._consumer.duplicates.document
            )

    def _take(self, deliveries: list[Delivery]) -> None:
        self._consumer.take(deliveries)

    def _make_ledger(self, service: Service, settings: Settings, longest_call_s: float) -> Ledger:
        if not settings.enable_etcd:
            return NoLedger(settings, self._loop, self._log)
        etcd, cache = Etcd(settings), Cache()
        fill_cache = partial(
            Importer, record_prefix(service.name), etcd, cache, self._loop, self._log
        )
        return EtcdLedger(
            service.name,
            settings,
            etcd,
            self._loop,
            self._health,
            self._log,
            cache,
            fill_cache,
            longest_call_s,
        )

    def until_stopped(self) -> int:
        """Consume until a signal, settle what is in hand, and return the exit code."""
        threading.Thread(target=self._await_signal, name="signals", daemon=True).start()
        # What its records' tokens begin with.
        self._log.info("starting", process=self._process)
        self._ledger.open(self._bus.open)
        self._beat()
        # An event leaves no cycles behind: the collector looks for them rarely, and not in what
        # is there from the start.
        gc.freeze()
        gc.set_threshold(50_000)
        code = 0
        try:
            self._loop.run()
        except Exception:  # noqa: BLE001 - a defect: said in the log, whatever it is
            code = 1
            self._log.critical("ended by a defect; what is not settled goes back", exc_info=True)
        self._ledger.close()
        self._metrics.close()
        self._log.info("stopped")
        self._logs.close()
        self._ended.set()
        return code

    def _beat(self) -> None:
        self._health.beat()
        overdue = self._consumer.overdue_calls()
        if overdue and not self._health.hanging:
            self._log.error("calls do not return; a restart frees their events", calls=overdue)
        self._health.hanging = overdue > 0
        self._metrics.send()
        self._loop.call_later(SEND_EVERY_S, self._beat)

    # The stop.

    def _await_signal(self) -> None:
        received = signal.sigwait(_STOP_SIGNALS)
        self._loop.call_soon(partial(self._stop, signal.Signals(received).name))
        if not self._ended.wait(_EXIT_WITHIN_S):
            self._log.error("a handler does not return: what is not settled goes back")
            self._logs.close()
            os._exit(0)

    def _stop(self, signal_name: str) -> None:
        self._log.info(
            "stopping: taking no more, settling what is in hand",
            signal=signal_name,
            in_hand=self._bus.in_hand,
        )
        self._health.lacks("running", "stopping")
        self._bus.stop_intake()
        until_s = self._loop.now_s() + FINISH_WITHIN_S
        self._consumer.end_by(until_s)
        self._finish(until_s)

    def _finish(self, until_s: float) -> None:
        if (self._bus.in_hand or self._consumer.busy) and self._loop.now_s() < until_s:
            self._loop.call_later(_TICK_S, lambda: self._finish(until_s))
            return
        self._consumer.ack_all()
        self._bus.close()
        self._end(self._loop.now_s() + _CLOSE_WITHIN_S)

    def _end(self, until_s: float) -> None:
        if not self._bus.closed and self._loop.now_s() < until_s:
            self._loop.call_later(_TICK_S, lambda: self._end(until_s))
            return
        self._loop.stop()


_STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT}

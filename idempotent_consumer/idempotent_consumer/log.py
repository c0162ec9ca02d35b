"""Structured logs, written by a thread of their own, so that a full pipe never delays an ack."""

from __future__ import annotations

import logging
import queue
import sys
import threading
from contextlib import suppress
from typing import Any

import structlog

_BACKLOG = 10_000  # Lines waiting for a reader that does not read. Further ones are dropped.
_LONGEST_TRACEBACK = 20_000  # Characters. An exception's message can contain a whole event.


class Logs:
    """The logging of the process, until ``close``.

    Every line goes to standard output: as JSON, or as text for people if a terminal reads it. So do
    the lines of the standard library's ``logging``, from the same level on.
    """

    def __init__(self, service: str, level: str, style: str | None) -> None:
        self._stream, terminal = sys.stdout, sys.stdout.isatty()
        # A SimpleQueue is reentrant: a finalizer or signal handler may log during another line.
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._dropped = 0
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()
        level = level.upper()
        processors: list[Any] = [
            structlog.contextvars.merge_contextvars,
            lambda _logger, _level, line: {"service": service, **line},
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _format_exception,
        ]
        renderer: Any = structlog.processors.JSONRenderer()
        if style == "console" or (style is None and terminal):
            processors.append(_escape)
            renderer = structlog.dev.ConsoleRenderer(colors=terminal, repr_native_str=True)
        renderer = _unfailing(renderer)
        structlog.configure(
            processors=[*processors, renderer],
            wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level)),
            logger_factory=lambda *_: self,
            cache_logger_on_first_use=False,
        )
        formatter = structlog.stdlib.ProcessorFormatter
        own: list[Any] = [structlog.stdlib.add_logger_name, structlog.stdlib.ExtraAdder()]
        self._handler = logging.StreamHandler[Any](self)
        self._handler.terminator = ""
        self._handler.setFormatter(
            formatter(
                foreign_pre_chain=[*own, *processors],
                processors=[formatter.remove_processors_meta, renderer],
            )
        )
        root = logging.getLogger()
        for other in list(root.handlers):
            if type(other) is logging.StreamHandler:  # logging.basicConfig has made it.
                root.removeHandler(other)
        root.addHandler(self._handler)
        root.setLevel(level)
        # pika's own lines repeat, with tracebacks, what this library logs in one line.
        logging.getLogger("pika").setLevel(logging.CRITICAL)
        self.logger: structlog.typing.FilteringBoundLogger = structlog.get_logger()

    def msg(self, line: str) -> None:
        """Queue a line of any level."""
        if self._lines.qsize() < _BACKLOG:
            self._lines.put(line)
        else:
            self._dropped += 1

    log = debug = info = warning = error = critical = write = msg

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            dropped, self._dropped = self._dropped, 0
            if dropped:
                line += f"\n(log: {dropped} lines dropped, since nobody read them in time)"
            try:
                self._stream.write(line + "\n")
                if self._lines.empty():
                    self._stream.flush()
            except (OSError, ValueError):
                self._dropped += dropped + 1
        # The last line may be unflushed if `close` came right after it; os._exit flushes nothing.
        with suppress(OSError, ValueError):
            self._stream.flush()

    def close(self) -> None:
        """Write what is waiting, within half a second."""
        logging.getLogger().removeHandler(self._handler)
        self._lines.put(None)
        self._thread.join(0.5)


def _format_exception(logger: Any, level: str, line: Any) -> Any:
    """Add an exception's traceback, without its middle if it is long."""
    try:
        line = structlog.processors.format_exc_info(logger, level, line)
    except Exception as error:  # noqa: BLE001 - whatever the exception's own code raises
        return {**line, "exception": f"its traceback cannot be written: {type(error).__name__}"}
    text, half = line.get("exception"), _LONGEST_TRACEBACK // 2
    if isinstance(text, str) and len(text) > 2 * half:
        line["exception"] = f"{text[:half]}\n[...]\n{text[-half:]}"
    return line


def printable(text: str, but: str = "") -> str:
    """Return a text with its control codes escaped, apart from those in ``but``.

    A terminal obeys control codes, and a message from outside can contain any.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in but else c.encode("unicode_escape").decode() for c in text
    )


def _escape(_logger: Any, _level: str, line: Any) -> Any:
    """Escape control codes in what structlog's ConsoleRenderer writes as it is."""
    for name, but in (("event", ""), ("exception", "\n\t")):
        if isinstance(text := line.get(name), str):
            line[name] = printable(text, but)
    return line


def _unfailing(renderer: Any) -> Any:
    """Return a renderer that never raises, or a handler that logs would fail and be called again.

    If a line cannot be rendered, values that are not strings are replaced by their ``repr``.
    """

    def render(logger: Any, level: str, line: Any) -> Any:
        try:
            return renderer(logger, level, dict(line))  # A copy, because it may remove members.
        except Exception:  # noqa: BLE001 - whatever a value of the line raises
            safe = {_text(name): _text(value) for name, value in line.items()}
            return renderer(logger, level, safe)

    return render


def _text(value: Any) -> str:
    try:
        return value if type(value) is str else repr(value)
    except Exception as error:  # noqa: BLE001 - whatever it raises
        return f"{type(value).__name__}, whose repr raises {type(error).__name__}"

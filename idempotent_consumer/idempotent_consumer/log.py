"""Structured logs, written by a thread of their own so that a full pipe never holds up an ack."""

from __future__ import annotations

import logging
import queue
import sys
import threading
from contextlib import suppress
from typing import Any

import structlog

_BACKLOG = 10_000  # Lines kept for a reader that does not read; what comes after is dropped.
_LONGEST_TRACEBACK = 20_000  # Characters. Its message can have a megabyte of an event in it.


class Logs:
    """The process's logging, from here to ``close``, which writes what is still waiting.

    Every line goes to standard output: as JSON, or for people where a terminal reads it. So do
    those of the standard library's logging, from the same level on.
    """

    def __init__(self, service: str, level: str, style: str | None) -> None:
        self._stream, terminal = sys.stdout, sys.stdout.isatty()
        # A line may come amid another, from a finalizer or a signal's handler.
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._dropped = 0
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()
        level = level.upper()
        renderer: Any = structlog.processors.JSONRenderer()
        if style == "console" or (style is None and terminal):
            renderer = structlog.dev.ConsoleRenderer(colors=terminal, repr_native_str=True)
            renderer = _escaping(renderer)
        renderer = _unfailing(renderer)
        processors: list[Any] = [
            structlog.contextvars.merge_contextvars,
            lambda _logger, _level, line: {"service": service, **line},
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _format_exception,
        ]
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
            if type(other) is logging.StreamHandler:  # By logging.basicConfig: a line comes once.
                root.removeHandler(other)
        root.addHandler(self._handler)
        root.setLevel(level)
        # The clients' own lines repeat, with tracebacks, what is told here in a line of ours.
        logging.getLogger("pika").setLevel(logging.CRITICAL)
        self.logger: structlog.typing.FilteringBoundLogger = structlog.get_logger()

    def msg(self, line: str) -> None:
        """Take a line, of whatever level."""
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
        # `close` can come before the last look at the queue, and os._exit flushes nothing.
        with suppress(OSError, ValueError):
            self._stream.flush()

    def close(self) -> None:
        """Write what waits, for half a second at the most."""
        logging.getLogger().removeHandler(self._handler)
        self._lines.put(None)
        self._thread.join(0.5)


def _format_exception(logger: Any, level: str, line: Any) -> Any:
    """Write an exception's traceback, unless what the exception itself adds to it raises.

    A long one loses its middle.
    """
    try:
        line = structlog.processors.format_exc_info(logger, level, line)
    except Exception as error:  # noqa: BLE001 - whatever it raises, a line ends no process
        return {**line, "exception": f"its traceback cannot be written: {type(error).__name__}"}
    text, half = line.get("exception"), _LONGEST_TRACEBACK // 2
    if isinstance(text, str) and len(text) > 2 * half:
        line["exception"] = f"{text[:half]}\n[...]\n{text[-half:]}"
    return line


def printable(text: str, but: str = "") -> str:
    """Return a text with all control codes but those in ``but`` written as in Python's source.

    A stranger's text can have any, and a terminal would obey them.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in but else c.encode("unicode_escape").decode() for c in text
    )


def _escaping(renderer: Any) -> Any:
    """Return a renderer that writes no control codes of what structlog's writes as it is."""

    def render(logger: Any, level: str, line: Any) -> Any:
        for name, but in (("event", ""), ("exception", "\n\t")):
            if isinstance(text := line.get(name), str):
                line[name] = printable(text, but)
        return renderer(logger, level, line)

    return render


def _unfailing(renderer: Any) -> Any:
    """Return a renderer that never raises: who logs is a handler, whose call would be made again.

    A line that it cannot render has the ``repr`` of each value that is no text.
    """

    def render(logger: Any, level: str, line: Any) -> Any:
        try:
            return renderer(logger, level, dict(line))  # It may take out what it has rendered.
        except Exception:  # noqa: BLE001 - whatever a value of the line raises
            safe = {_text(name): _text(value) for name, value in line.items()}
            return renderer(logger, level, safe)

    return render


def _text(value: Any) -> str:
    try:
        return value if type(value) is str else repr(value)
    except Exception as error:  # noqa: BLE001 - whatever it raises
        return f"{type(value).__name__}, whose repr raises {type(error).__name__}"

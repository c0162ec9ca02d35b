"""The pool of threads, and an exception in one line."""

from __future__ import annotations

import threading

import pytest

from idempotent_consumer.handlers import Pool, one_line

DEADLINE_S = 10.0


def test_a_pool_runs_as_many_jobs_at_once_as_it_has_threads() -> None:
    """Each job waits until all three run."""
    pool, together, ended = Pool(3), threading.Barrier(3), threading.Barrier(4)

    def job() -> None:
        together.wait(DEADLINE_S)
        ended.wait(DEADLINE_S)

    for _ in range(3):
        pool.run(job)
    ended.wait(DEADLINE_S)
    assert not ended.broken


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("no"), "ValueError: no"),
        (ValueError("two\nlines\tand\r\nmore"), "ValueError: two lines and more"),
        (KeyError("k"), "KeyError: 'k'"),
        (RuntimeError(), "RuntimeError:"),
        (ValueError("a\ud800b"), "ValueError: a?b"),
    ],
)
def test_an_exception_is_written_in_one_line(error: Exception, expected: str) -> None:
    assert one_line(error) == expected


def test_the_line_is_bounded_and_can_be_encoded() -> None:
    line = one_line(ValueError("ä\udcff" * 10_000))
    assert len(line) == 500
    line.encode()

"""The little that the HTTP sink knows of HTTP."""

import pytest

from .sink import after_request, asked_ms

REQUEST = b"POST /n HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nIdempotency-Key: 1\r\n\r\n1234"


@pytest.mark.parametrize("size", [0, 1, REQUEST.index(b"1234"), len(REQUEST) - 1])
def test_a_request_that_has_not_arrived_whole_is_waited_for(size: int) -> None:
    assert after_request(REQUEST[:size]) is None


def test_what_follows_a_request_is_the_next_one() -> None:
    assert after_request(REQUEST) == b""
    assert after_request(REQUEST + b"POST") == b"POST"


@pytest.mark.parametrize(("path", "ms"), [(b"/0", 0), (b"/100", 100), (b"/n", 0), (b"/", 0)])
def test_the_path_says_after_how_many_milliseconds_to_answer(path: bytes, ms: int) -> None:
    assert asked_ms(REQUEST.replace(b"/n", path)) == ms

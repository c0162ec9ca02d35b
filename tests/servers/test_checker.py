"""The checker finds each kind of fault: a test that trusts it must be able to fail."""

import pytest

from servers.checker import doubles, judge
from servers.etcd import Change

DONE = b'{"state": "done"}'
CLAIMED = b'{"state": "claimed"}'


def put(revision: int, key: str, value: bytes = DONE) -> Change:
    """Return a put."""
    return Change(revision, "put", key, value)


def delete(revision: int, key: str) -> Change:
    """Return a delete."""
    return Change(revision, "delete", key, b"")


def test_a_run_without_fault_passes() -> None:
    """Recorded or parked, each once, and an unknown confirm that landed is no fault."""
    verdict = judge(
        attempted="abcd", confirmed="abd", recorded="abc", parked="d", double=doubles([put(1, "a")])
    )
    verdict.require(confirmed_at_least=3)
    assert verdict.recovered == {"c"}


@pytest.mark.parametrize(
    ("attempted", "confirmed", "recorded", "fault"),
    [("ab", "ab", "a", "lost: 1"), ("a", "a", "ax", "unexpected: 1"), ("a", "a", "a", "only 1")],
)
def test_a_fault_is_named(attempted: str, confirmed: str, recorded: str, fault: str) -> None:
    """What is lost, made up, or too little to mean anything fails with its name."""
    verdict = judge(attempted=attempted, confirmed=confirmed, recorded=recorded)
    with pytest.raises(AssertionError, match=fault):
        verdict.require(confirmed_at_least=2)


@pytest.mark.parametrize("effected", ["a", "abc"])
def test_a_record_and_its_effect_come_together(effected: str) -> None:
    verdict = judge(attempted="abc", confirmed="ab", recorded="ab", effected=effected)
    with pytest.raises(AssertionError, match="torn: 1"):
        verdict.require(confirmed_at_least=1)


def test_a_key_put_twice_or_deleted_is_double() -> None:
    """A record or an effect is put once and stays."""
    history = [put(1, "once"), put(2, "twice"), put(3, "twice"), put(4, "gone"), delete(5, "gone")]
    found = doubles(history)
    assert set(found) == {"twice", "gone"}
    with pytest.raises(AssertionError, match="double: 2"):
        judge(attempted="a", confirmed="a", recorded="a", double=found).require(
            confirmed_at_least=1
        )


def test_a_claimed_record_is_done_once_and_last() -> None:
    """Claims may come and go; a second done, or anything after the first, is a double."""
    history = [
        put(1, "c/fine", CLAIMED),
        put(2, "c/fine"),
        put(3, "c/taken over", CLAIMED),
        delete(4, "c/taken over"),
        put(5, "c/taken over", CLAIMED),
        put(6, "c/taken over"),
        put(7, "c/released", CLAIMED),
        delete(8, "c/released"),
        put(9, "c/twice"),
        put(10, "c/twice"),
        put(11, "c/reopened"),
        put(12, "c/reopened", CLAIMED),
    ]
    assert set(doubles(history, claimed=("c/",))) == {"c/twice", "c/reopened"}

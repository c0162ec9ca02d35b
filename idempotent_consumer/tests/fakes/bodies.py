"""Events drawn by Hypothesis and serialised in many ways, without the code under test."""

import json
from typing import Any

import orjson
from hypothesis import strategies as st

from fakes.corpus import AWKWARD_IDS

Json = dict[str, Any]

_SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text()
JSON_VALUES = st.recursive(
    _SCALARS | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
ARGS = st.dictionaries(st.text(), JSON_VALUES, max_size=4)
IDS = st.text(min_size=1) | st.sampled_from(AWKWARD_IDS)


def events() -> st.SearchStrategy[Json]:
    """Draw events that have a handler, also with other members of any value."""
    others = st.dictionaries(st.sampled_from(["sent", "trace", "ID", "x" * 300]), JSON_VALUES)
    known = {"id": IDS, "type": st.just("new_order")}
    event = st.fixed_dictionaries(known, optional={"args": ARGS})
    return st.tuples(others, event).map(lambda both: {**both[0], **both[1]})


@st.composite
def shuffled(draw: st.DrawFn, value: Any) -> Any:
    """Draw another order for the members of each object in a value."""
    if isinstance(value, list):
        return [draw(shuffled(each)) for each in value]
    if isinstance(value, dict):
        names = draw(st.permutations(list(value)))
        return {name: draw(shuffled(value[name])) for name in names}
    return value


@st.composite
def written(draw: st.DrawFn, event: Json) -> bytes:
    """Draw one of the ways in which producers serialise an event."""
    event = draw(shuffled(event))
    if draw(st.booleans()):
        return orjson.dumps(event)
    text = json.dumps(
        event,
        ensure_ascii=draw(st.booleans()),
        separators=draw(st.sampled_from([(",", ":"), (", ", ": "), ("\n,\t", " :\r\n")])),
        indent=draw(st.sampled_from([None, 0, 3])),
    )
    before, behind = draw(st.sampled_from(["", " ", "\r\n\t"])), draw(st.sampled_from(["", "\n"]))
    return (before + text + behind).encode()

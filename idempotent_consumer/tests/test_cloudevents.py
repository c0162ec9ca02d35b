"""CloudEvents are decoded in both modes, and malformed ones are invalid."""

from typing import Any

import orjson
import pytest

from idempotent_consumer import InvalidEvent, Service, cloudevents
from idempotent_consumer.event import Event, Properties
from idempotent_consumer.testing import InMemory

ATTRIBUTES = {"specversion": "1.0", "id": "7", "source": "/shop", "type": "new_order"}
JSON_EVENT = "application/cloudevents+json; charset=utf-8"


def structured(content_type: str | None = JSON_EVENT, **members: Any) -> Event:
    body = orjson.dumps({**ATTRIBUTES, **members})
    return cloudevents.decode(body, Properties(content_type=content_type))


def binary(body: bytes, content_type: str | None, prefix: str = "cloudEvents:") -> Event:
    headers = {prefix + name: value for name, value in ATTRIBUTES.items()} | {"other": 1}
    return cloudevents.decode(body, Properties(headers, content_type=content_type))


@pytest.mark.parametrize("content_type", [JSON_EVENT, "Application/JSON ; v=1", None])
def test_a_structured_one_is_decoded_with_its_source_in_its_id(content_type: str | None) -> None:
    event = structured(content_type, subject="a", data={"n": 1})
    assert (event.id, event.type, event.args) == ("/shop 7", "new_order", {"n": 1})
    assert (event.members["subject"], event.members["source"]) == ("a", "/shop")


@pytest.mark.parametrize("prefix", ["cloudEvents:", "cloudEvents_"])
def test_a_binary_one_is_decoded_with_the_attributes_in_its_headers(prefix: str) -> None:
    event = binary(b'{"n":1}', "application/json", prefix)
    assert (event.id, event.type, event.args) == ("/shop 7", "new_order", {"n": 1})
    assert event.members == {**ATTRIBUTES, "datacontenttype": "application/json"}


@pytest.mark.parametrize("content_type", [JSON_EVENT, "application/json"])
def test_the_media_type_decides_about_the_mode(content_type: str) -> None:
    """A structured one may repeat its attributes in the headers (3.2.3 of the AMQP binding)."""
    document = {**ATTRIBUTES, "data": {"n": 1}}
    expected = {"n": 1} if content_type == JSON_EVENT else document
    assert binary(orjson.dumps(document), content_type).args == expected


@pytest.mark.parametrize(
    ("members", "args"),
    [
        ({}, {}),
        ({"data": None}, {}),
        ({"data": [1]}, {"data": [1]}),
        ({"data": "text"}, {"data": "text"}),
        ({"data_base64": "AAE="}, {"data_base64": "AAE="}),
        ({"data_base64": "eyJuIjoxfQ==", "datacontenttype": "text/x+json"}, {"n": 1}),
    ],
)
def test_data_of_every_kind_becomes_args(members: dict[str, Any], args: dict[str, Any]) -> None:
    assert structured(**members).args == args


@pytest.mark.parametrize(
    ("body", "content_type", "args"),
    [
        (b"", None, {}),
        (b'{"n":1}', None, {"n": 1}),
        (b'{"n":1}', "application/vnd.shop+json", {"n": 1}),
        (b'{"n":1}', "text/plain", {"data_base64": "eyJuIjoxfQ=="}),
    ],
)
def test_a_body_is_decoded_by_its_content_type(
    body: bytes, content_type: str | None, args: dict[str, Any]
) -> None:
    event = binary(body, content_type)
    assert event.args == args
    assert ("datacontenttype" in event.members) == (content_type is not None)


@pytest.mark.parametrize(
    ("body", "content_type", "says"),
    [
        (b"{", None, "not JSON"),
        (b'["specversion"]', JSON_EVENT, "no specversion"),
        (b'{"id":"1","type":"new_order"}', None, "no specversion"),
        (b"<event/>", "application/cloudevents+xml", "application/cloudevents+xml"),
        (b"[]", "application/cloudevents-batch+json", "application/cloudevents-batch+json"),
        (orjson.dumps({**ATTRIBUTES, "specversion": "0.3"}), JSON_EVENT, "0.3"),
        (orjson.dumps({**ATTRIBUTES, "id": ""}), JSON_EVENT, "id"),
        (orjson.dumps({**ATTRIBUTES, "type": 7}), JSON_EVENT, "type"),
        (orjson.dumps({**ATTRIBUTES, "source": None}), JSON_EVENT, "source"),
        (orjson.dumps({**ATTRIBUTES, "source": "a b"}), JSON_EVENT, "white space"),
        (orjson.dumps({**ATTRIBUTES, "data_base64": "?"}), JSON_EVENT, "base64"),
        (orjson.dumps({**ATTRIBUTES, "data_base64": 7}), JSON_EVENT, "base64"),
    ],
)
def test_a_malformed_one_is_invalid(body: bytes, content_type: str, says: str) -> None:
    with pytest.raises(InvalidEvent, match=says.replace("+", r"\+")):
        cloudevents.decode(body, Properties(content_type=content_type))


def test_one_is_consumed_once_in_either_mode() -> None:
    """Two sources may use the same id, and one event may arrive in both modes."""
    service = Service("billing", noun="invoices", decode=cloudevents.decode)
    seen: list[str] = []
    service.handler("new_order")(lambda event: seen.append(event.id))
    world = InMemory(service)
    world.publish({**ATTRIBUTES, "data": {"n": 1}}, content_type="application/cloudevents+json")
    world.publish({**ATTRIBUTES, "source": "/other", "data": {"n": 1}})
    headers = {"cloudEvents:" + name: value for name, value in ATTRIBUTES.items()}
    world.publish(b'{"n":1}', headers=headers)
    world.publish(b'{"id":"1","type":"new_order"}')
    assert seen == ["/shop 7", "/other 7"]
    assert world.counts == {"received": 4, "processed": 2, "processed_skipped": 1, "invalid": 1}

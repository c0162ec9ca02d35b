"""CloudEvents 1.0 as events: ``Service("billing", noun="invoices", decode=cloudevents.decode)``.

Both modes are supported: structured ("JSON Event Format"), and binary, whose attributes are headers
that begin with ``cloudEvents:`` or ``cloudEvents_`` ("AMQP Protocol Binding").
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from typing import Any

import orjson

from .event import Event, InvalidEvent, Properties

_PREFIXES = ("cloudEvents:", "cloudEvents_")
_CLOUDEVENTS = "application/cloudevents"
_STRUCTURED = ("application/cloudevents+json", "application/json", "")


def decode(body: bytes, properties: Properties) -> Event:
    """Decode a CloudEvent. Raises InvalidEvent.

    The event's id is ``<source> <id>``, since a CloudEvent's own id is unique only within its
    source. The args are the data if that is a JSON object, and empty if there is none. Any other
    data is a member of the args: JSON is ``data``, anything else ``data_base64``. The event's
    members are the CloudEvent's attributes.
    """
    content_type = _media_type(properties.content_type)
    binary = {
        name[len(_PREFIXES[0]) :]: value
        for name, value in properties.headers.items()
        if name.startswith(_PREFIXES)
    }
    # A structured one may have such headers too (3.2.3 of the binding): the media type decides.
    if binary and not content_type.startswith(_CLOUDEVENTS):
        if properties.content_type is not None:
            binary["datacontenttype"] = properties.content_type
        return _event(binary, _args(body, properties.content_type) if body else {})
    if content_type not in _STRUCTURED:
        raise InvalidEvent(f"no CloudEvent that is read here: its content type is {content_type}")
    document = _json(body)
    if not isinstance(document, dict) or "specversion" not in document:
        raise InvalidEvent("no CloudEvent: it has no specversion, nor such headers")
    return _event(document, _args_of(document))


def _event(attributes: dict[str, Any], args: dict[str, Any]) -> Event:
    if attributes.get("specversion") != "1.0":
        version = attributes.get("specversion")
        raise InvalidEvent(f"a CloudEvent of specversion {version!r:.100}; 1.0 is read")
    for name in ("id", "source", "type"):
        if not isinstance(attributes.get(name), str) or not attributes[name]:
            raise InvalidEvent(f"the CloudEvent's {name} is not a non-empty string")
    source = attributes["source"]
    if any(character.isspace() for character in source):
        # It would make ids ambiguous, and a URI reference has none.
        raise InvalidEvent("the CloudEvent's source has white space in it")
    return Event(f"{source} {attributes['id']}", attributes["type"], args, attributes)


def _args_of(document: dict[str, Any]) -> dict[str, Any]:
    """Return the args of a structured CloudEvent."""
    if "data_base64" not in document:
        return _args(document.get("data"))
    try:
        data = b64decode(document["data_base64"], validate=True)
    except (ValueError, TypeError):
        raise InvalidEvent("the CloudEvent's data_base64 is not base64") from None
    content_type = document.get("datacontenttype", "application/octet-stream")
    return _args(data, content_type if isinstance(content_type, str) else None)


def _args(data: Any, content_type: str | None = None) -> dict[str, Any]:
    """Return data as args. Bytes without a content type are taken for JSON."""
    if isinstance(data, bytes):
        media_type = _media_type(content_type)
        if media_type not in ("", "application/json") and not media_type.endswith("+json"):
            return {"data_base64": b64encode(data).decode()}
        data = _json(data)
    if data is None:
        return {}
    return data if isinstance(data, dict) else {"data": data}


def _media_type(content_type: str | None) -> str:
    return (content_type or "").partition(";")[0].strip().lower()


def _json(text: bytes) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise InvalidEvent(f"not JSON: {error}") from None

"""A corpus of bodies: invalid events, and valid ones that look odd."""

import gzip
import json

MIB = 1024 * 1024

_NO_VALUES = [
    *rb"""NaN Infinity -Infinity 1e999 01 +1 .5 0x1 'a' undefined "\ud800" "\udfff" "a\udfffb"
          "\udc00\ud800" {"\ud800":1} "\x41" [1,] {1:2}""".split(),
    b'"a\tb"',
    b"// so",
    b'"\xff"',
    b'"\xff\xfe"',
    b'"\xc3"',
    b'"\xed\xa0\x80"',
    b'"\xf5\x80\x80\x80"',
    b'"\xc0\xaf"',
    b"[" * 300 + b"]" * 300,
    b"[" * 600 + b"]" * 600,
    b'{"a":' * 300 + b"1" + b"}" * 300,
    b"9" * 400_000,
    b"[" * 100_000 + b"]" * 100_000,
    b'{"a":' * 170_000,
]
"""Values in args that are not JSON, or that have no digest."""

_EVENT = b'{"id":"bad","type":"new_order"}'

_SHAPES = [
    b"[" + _EVENT + b"]",
    json.dumps(_EVENT.decode()).encode(),
    b'{"data":' + _EVENT + b"}",
    _EVENT + _EVENT,
    _EVENT + b"\n" + _EVENT + b"\n",
    _EVENT + b",",
    _EVENT + b"\0",
    _EVENT[:-1],
    _EVENT[:-1] + b",}",
    _EVENT.replace(b'"', b"'"),
    _EVENT.replace(b'"id"', b"id"),
    b"/* an event */" + _EVENT,
    b"\xef\xbb\xbf" + _EVENT,
    _EVENT.decode().encode("utf-16"),
    _EVENT.decode().encode("utf-16-le"),
    _EVENT.decode().encode("utf-32"),
    gzip.compress(_EVENT, mtime=0),
    *rb"""
        {} {"type":"new_order"} {"id":"bad"} {"ID":"bad","type":"new_order"}
        {"id":"","type":"new_order"} {"id":null,"type":"new_order"} {"id":true,"type":"new_order"}
        {"id":7,"type":"new_order"} {"id":["a"],"type":"new_order"} {"id":{},"type":"new_order"}
        {"id":1.5,"type":"new_order"} {"id":"\ud800","type":"new_order"} {"id":"bad","type":""}
        {"id":"bad","type":null} {"id":"bad","type":2} {"id":"bad","type":true}
        {"id":"bad","type":[]} {"id":"bad","type":{"name":"new_order"}}
        {"id":"bad","type":"new_order","args":null} {"id":"bad","type":"new_order","args":[]}
        {"id":"bad","type":"new_order","args":"{}"} {"id":"bad","type":"new_order","args":0}
        {"id":"bad","type":"new_order","args":false} {"id":"bad","type":"new_order","args":""}
        {"id":"bad","type":"new_order","id":null}
        {"id":"bad","type":"new_order","args":{},"args":[]}
        true null 7 "text" [] { -
    """.split(),
    b'{"id":"\xff","type":"new_order"}',
    b'{"id":"\xed\xa0\x80","type":"new_order"}',
    b'{"id":"bad","type":"new_order","unread":"\xc3"}',
    b'{"id":"bad","type":"new_order","unread":' + b"[" * 5000 + b"]" * 5000 + b"}",
    b"id=bad&type=new_order",
    b"<event id='bad' type='new_order'/>",
    b"bad,new_order",
    b"not json",
    b"",
    b" \n\t",
    b"\0" * 1000,
    b"\xff" * 1000,
]

_LARGE = [
    _EVENT + b" " * (MIB + 1 - len(_EVENT)),
    b'{"id":"bad","type":"new_order","args":{"a":"' + b"x" * MIB + b'"}}',
    b'{"id":"' + b"x" * (5 * MIB) + b'","type":"new_order"}',
    b"x" * (16 * MIB),
    b"[" * (16 * MIB),
    b"[" + b"{}," * (5 * MIB) + b"{}]",
    b"[" * 10**6,
]

NO_EVENTS = [
    *(b'{"id":"bad","type":"new_order","args":{"a":%b}}' % value for value in _NO_VALUES),
    *_SHAPES,
    *_LARGE,
    *_SHAPES[:3],
    _LARGE[0],
]
"""Some are in it twice: equal bodies are still different messages."""

AWKWARD_IDS = (
    # Like paths, and like other keys.
    *("123", "a/b", "123/", "123//", "/", "//", "..", "../notify/123", "/service/order/123"),
    # With characters that are invisible.
    *("123\0", "\0", " ", "123\n", "123 ", "\ufeff123", "\u200b123", "\U0010ffff", "%2F"),
    # Equal except for case, or after normalisation.
    *("ABC", "abc", "\u00e9", "e\u0301", "\u00df", "SS", "\ufb01", "fi", "\u0130", "i\u0307"),
    # Like the hash that replaces a long id.
    *("sha256:", "sha256", "sha256:" + "0" * 64, "SHA256:" + "0" * 64),
    # Of the greatest length, and longer.
    *("x" * length for length in (127, 128, 129, 10_000, 10_001)),
    *("\u00e9" * 64, "\u00e9" * 64 + "x", "\u00e9" * 63 + "x"),
    *("\U0001f600" * 32, "\U0001f600" * 32 + "x"),
)
"""Ids for which a careless key would be the same, or impossible."""

ODD_EVENTS = {
    **{each: json.dumps({"id": each, "type": "new_order"}).encode() for each in AWKWARD_IDS},
    "white space": b'\r\n\t { "id" :\n"white space" , "type":"new_order" } \n',
    "escaped": b'{"\\u0069d":"\\u0065scaped","type":"new\\u005forder"}',
    "a pair": b'{"id":"a pair","type":"new_order","args":{"\\ud83d\\ude00":"\\ud83d\\ude00"}}',
    "the last": b'{"id":"the first","type":"new_order","id":"the last"}',
    "numbers": b'{"id":"numbers","type":"new_order","args":{"n":[1e308,-0.0,'
    b"18446744073709551616,0.1e-400,%b]}}" % (b"9" * 100),
    "deep": b'{"id":"deep","type":"new_order","args":{"a":' + b"[" * 200 + b"]" * 200 + b"}}",
    "other members": b'{"id":"other members","type":"new_order","x":null,"args":{},"":[[]]}',
    "1 MiB": b'{"id":"1 MiB","type":"new_order"}'.ljust(MIB),
}
"""Bodies by the id of the event."""


def shown(body: bytes) -> str:
    """Return the id of a test with this body."""
    return f"{len(body)} bytes, {body[:40]!r}"

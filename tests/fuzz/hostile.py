"""The messages: known killers, messages that hypothesis generates, and these with bytes changed at random."""

from __future__ import annotations

import base64
import json
import pickle
import random
import re
import zlib
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Mutated copies of each message that hypothesis generates.
MUTANTS = 4

_RAW = re.compile(r'"@@((?:[^"\\]|\\.)*)@@"')


def raw(text: str) -> str:
    """A value that `dumps` writes unchanged: JSON that no Python value stands for, or no JSON."""
    return f"@@{text}@@"


def dumps(value: Any) -> str:
    return _RAW.sub(lambda match: json.loads(f'"{match[1]}"'), json.dumps(value))


def message(body: str, headers: Any = None, /, **changes: Any) -> bytes:
    """A message as a producer sends it, except for `changes`."""
    fields = {
        "body": base64.b64encode(body.encode(errors="surrogatepass")).decode(),
        "headers": {"task": "tokens.burn", "id": "an-id", "lang": "py"} if headers is None else headers,
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "properties": {
            "delivery_tag": "a-tag",  # the same in all: repeated delivery tags
            "delivery_info": {"exchange": "", "routing_key": "tokens"},
            "body_encoding": "base64",
            "delivery_mode": 2,
            "priority": 0,
        },
    }
    return dumps(fields | changes).encode(errors="surrogatepass")


def headers(task: Any = "tokens.burn", /, **more: Any) -> dict[str, Any]:
    return {"task": task, "id": "an-id", "lang": "py"} | more


def properties(**changes: Any) -> dict[str, Any]:
    return {
        "delivery_tag": "a-tag",
        "delivery_info": {"exchange": "", "routing_key": "tokens"},
        "body_encoding": "base64",
    } | changes


def call(kwargs: Any, args: Any = (), embed: Any = None) -> str:
    return dumps([list(args) if args == () else args, kwargs, {} if embed is None else embed])


FIELDS = {"user_id": "hostile", "amount": "1", "idempotency_key": "k", "action": "fuzz"}
BULK = headers("tokens.apply_many")


def deep(levels: int, opening: str = "[", closing: str = "]", inside: str = "") -> str:
    return raw(opening * levels + inside + closing * levels)


class Killer(NamedTuple):
    """A message that once killed, blocked or misled a worker, or could."""

    name: str
    raw: bytes
    reason: str | None  # of its dead letter; None if it is applied or rejected


def killers(marker: Path) -> Iterator[Killer]:
    """One of each kind. Loading a pickle or YAML among them would create the file `marker`."""
    serial = count()

    def plain() -> str:
        """A valid call with a key of its own: the same task, id and body would be the same dead letter."""
        return call(FIELDS | {"idempotency_key": f"plain {next(serial)}"})

    # Not a message
    for name, data in {
        "nothing": b"",
        "not UTF-8": b"\xff\xfe\x00 no message",
        "UTF-16": '{"a": 1}'.encode("utf-16"),
        "a NUL": b"\0",
        "null": b"null",
        "a list": b"[1]",
        "10^5000": b"1" + b"0" * 5000,
        "deeper than Python": b'{"a":' * 100_000,
        "half a message": message(plain())[:-9],
        "empty object": b"{}",
        "properties null": message(plain(), properties=None),
        "properties a number": message(plain(), properties=5),
        "delivery_info null": message(plain(), properties={"delivery_tag": "x", "delivery_info": None}),
        "headers a list": message(plain(), headers=[1]),
        "task a list": message(plain(), headers(["tokens.burn"])),
        "id a number": message(plain(), headers(id=5)),
        "body an object": message(plain(), body={"a": 1}),
        "body_encoding a list": message(plain(), properties=properties(body_encoding=[])),
        "body_encoding unknown": message(plain(), properties=properties(body_encoding="rot13")),
        "body not base64": message(plain(), body="%%%"),
        "half a surrogate in the body": message(plain(), body="\ud800", properties=properties(body_encoding=None)),
        "priority infinite": message(plain(), properties=properties(priority=raw("1e999"))),
        "unknown type tag": message(plain(), headers(eta={"__type__": "os.system", "__value__": "x"})),
        "decimal tag of nonsense": message(plain(), headers(eta={"__type__": "decimal", "__value__": "x"})),
        "uuid tag of nonsense": message(plain(), headers(eta={"__type__": "uuid", "__value__": {"version": 9}})),
        "bytes tag of a number": message(plain(), headers(eta={"__type__": "bytes", "__value__": 5})),
        "a bomb": message("", headers(compression="zlib"), body=bomb(1 << 20)),
        "unknown compression": message(plain(), headers(compression="arj")),
        "compression a list": message(plain(), headers(compression=["zlib"])),
    }.items():
        yield Killer(name, data, "undecodable")

    # A message, but no call
    for name, data in {
        "empty body": message(""),
        "body null": message(plain(), body=None),
        "number with an exponent of 22 digits": message(call(FIELDS | {"amount": raw("1e9999999999999999999999x")})),
        "two elements": message(dumps([[], FIELDS])),
        "object without task": message(dumps(FIELDS)),
        "deep": message("[" * 100_000),
        "not UTF-8 inside": message(plain(), body=base64.b64encode(b'["\xff"]').decode()),
        "pickle": message("", body=base64.b64encode(pickled(marker)).decode())
        .replace(b"application/json", b"application/x-python-serialize")
        .replace(b"utf-8", b"binary"),
        "pickle that claims to be JSON": message("", body=base64.b64encode(pickled(marker)).decode()),
        "yaml": message(yaml(marker)).replace(b"application/json", b"application/x-yaml"),
        "yaml that claims to be JSON": message(yaml(marker)),
        "content type null": message(plain(), **{"content-type": None}),
        "content encoding unknown": message(plain(), **{"content-encoding": "klingon"}),
        "for the transport's own task": message(
            plain(), headers("tokentrail.undecodable", tokentrail_reason=[["\u202e"]])
        ),
    }.items():
        yield Killer(name, data, "undecodable")

    for name, data in {
        "no task": message(plain(), {}),
        "another task": message(plain(), headers("celery.chord_unlock")),
        "a task with a NUL and bidi": message(plain(), headers("\0\u202e\ud800\n")),
        "protocol 1, task a list": message(dumps({"task": ["x"], "id": {}, "args": [], "kwargs": {}}), {}),
    }.items():
        yield Killer(name, data, "unknown_task")

    for name, data in {
        "positional arguments": message(call(FIELDS, [1])),
        "kwargs null": message(call(raw("null"))),
        "kwargs a list": message(call([])),
        "kwargs with a key twice": message(call(raw('{"user_id":"a","user_id":"b"}'))),
        "no events": message(call({"events": []}), BULK),
        "1,001 events": message(call({"events": [0] * 1001}), BULK),
        "events an object": message(call({"events": {"a": 1}}), BULK),
        "events and more": message(call({"events": [1], "more": 1}), BULK),
        "protocol 1 without kwargs": message(dumps({"task": "tokens.burn", "id": "x"}), {}),
        "protocol 1, id a list": message(dumps({"task": "tokens.burn", "id": ["x"], "kwargs": [1]}), {}),
    }.items():
        yield Killer(name, data, "invalid_arguments")

    for field, values in INVALID.items():
        for number, value in enumerate(values):
            yield Killer(f"{field} {number}", message(call(FIELDS | {field: value})), "invalid_event")
    for number, name in enumerate(("\ud800", "\u202e", "\0", "", "x" * 100_000, "type ", "__class__", "self", "cls")):
        yield Killer(f"a field too many {number}", message(call(FIELDS | {name: 1})), "invalid_event")
    yield Killer("no field", message(call({})), "invalid_event")
    yield Killer("one bad event of one", message(call({"events": [None]}), BULK), "invalid_event")
    yield Killer(
        "replay of no dead letter", message(call({}), headers(tokentrail_dead_letter=1 << 62)), "invalid_event"
    )
    yield Killer("replay of a list", message(call({}), headers(tokentrail_dead_letter=[1])), "invalid_event")

    yield Killer("eta", message(plain(), headers(eta="2030-01-01T00:00:00Z")), "scheduled")
    yield Killer("eta deep", message(plain(), headers(eta=deep(800))), "scheduled")
    yield Killer("expired in year 1", message(plain(), headers(expires="0001-01-01T00:00:00+14:00")), "expired")
    yield Killer("expires a number", message(plain(), headers(expires=1e300)), "expired")
    yield Killer("expires with bidi", message(plain(), headers(expires="2020-01-01\u202e00:00:00")), "expired")
    yield from _decided()


def _decided() -> Iterator[Killer]:
    """Odd headers and properties around a valid event."""
    for number, (name, value) in enumerate((name, value) for name in CELERY_HEADERS for value in ODD):
        fields = FIELDS | {"idempotency_key": f"odd {number}"}
        yield Killer(f"{name} = {value!a:.40}", message(call(fields), headers(**{name: value})), None)
    for number, (name, value) in enumerate((name, value) for name in CELERY_PROPERTIES for value in ODD):
        fields = FIELDS | {"idempotency_key": f"odd property {number}"}
        yield Killer(f"{name} = {value!a:.40}", message(call(fields), properties=properties(**{name: value})), None)
    tag = {"__type__": "uuid", "__value__": {"hex": "0" * 32}}
    fields = {"task": "tokens.burn", "args": None, "kwargs": FIELDS | {"idempotency_key": "protocol 1"}}
    yield Killer("id a UUID", message(call(FIELDS | {"idempotency_key": "id"}), headers(id=tag)), None)
    yield Killer("protocol 1", message(dumps(fields | {"id": {"a": []}}), {}), None)


def bomb(size: int) -> str:
    """Base64 of `size` bytes that are 1,030 times as many zeros."""
    packer = zlib.compressobj(9)
    zeros = bytes(1 << 20)
    packed = b"".join(packer.compress(zeros) for _ in range(size * 1030 >> 20)) + packer.flush()
    return base64.b64encode(packed).decode()


class _Loaded:
    """Its pickle calls `Path.touch`."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._marker,)


def pickled(marker: Path) -> bytes:
    return pickle.dumps(_Loaded(marker))


def yaml(marker: Path) -> str:
    return f"!!python/object/apply:os.system ['touch {marker}']"


#: Values that break the rules of each field.
INVALID: dict[str, list[Any]] = {
    "user_id": [None, "", "x" * 129, 1, 1.5, True, [], {}, "\0", "\ud800", raw("1e9999999999999999999"), "u" * 10**6],
    "idempotency_key": [None, "", "x" * 201, "a\0", "\udfff", deep(400), raw('{"a":1,"a":2}')],
    "action": [None, "", 0, "\ud83d", {"__type__": "bytes", "__value__": "x"}],
    "source": ["of a burn"],
    "type": ["accrual", None, [], "\0"],
    "amount": [
        *(None, "", "0", "-1", "+1", "1e1", "1_000", " 1", "٣", "NaN", "Infinity", "1." + "1" * 19, "1" * 21, "1\n"),
        *(0, -1, 1.5, True, [], {}, 10**12 + 1, 10**400, -(10**400), raw("1" * 5000), raw("NaN"), raw("-Infinity")),
        *(
            raw("1e400"),
            raw("1E+999999999999999999"),
            raw("1e9999999999999999999999"),
            raw("-1e-9999999999999999999999"),
        ),
        *(deep(900), deep(900, '{"a":', "}", "1"), raw("0." + "1" * 100_000)),
        {"__type__": "decimal", "__value__": "NaN"},
        {"__type__": "decimal", "__value__": "1E+999999999"},
        {"__type__": "datetime", "__value__": "1"},
        raw('{"__type__":"decimal","__type__":"decimal","__value__":"1"}'),
    ],
    "occurred_at": [
        *("", 0, 1.5, "1700000000", "now", "2026-01-31", "2026-01-31T12:00:00", "2026-01-31T24:00:00Z"),
        *(
            "0001-01-01T00:00:00+14:00",
            "9999-12-31T23:59:59-14:00",
            "2026-01-31T12:00:00+05:60",
            "1999-12-31T23:59:59Z",
        ),
        *("2026-02-30T00:00:00Z", "2026-01-31T12:00:60Z", "２０２６-01-31T12:00:00Z", "9000-01-01T00:00:00Z"),
        {"__type__": "datetime", "__value__": "2026-01-31T12:00:00"},
        {"__type__": "date", "__value__": "2026-01-31"},
    ],
    "metadata": [
        *([], "{}", 1, raw('{"a":1,"a":1}'), raw('{"a":NaN}'), raw('{"a":1e401}'), raw('{"a":1e99999999999999999999}')),
        *({"\0": 1}, {"\ud800": 1}, {"a": "\udc00"}, {"a": {"\u202e\n": [float("inf")]}}, {"a": "x" * 17_000}),
        *({"a": deep(8)}, deep(900, '{"a":', "}", "1"), {"a": {"__type__": "decimal", "__value__": "1"}}),
    ],
}

ODD = [
    None,
    True,
    0,
    -1,
    1.5,
    10**400,
    "",
    "\u202e\0\ud800\n",
    [],
    [[None]],
    {},
    {"a": {"b": [1]}},
    raw("NaN"),
    deep(300),
]

#: Headers of Celery that change nothing about an event.
CELERY_HEADERS = (
    *("root_id", "parent_id", "group", "group_index", "retries", "timelimit", "shadow", "argsrepr", "kwargsrepr"),
    *("origin", "ignore_result", "replaced_task_nesting", "stamped_headers", "stamps", "lang", "meth", "clock"),
    *("redelivered", "hostname", "tokentrail_restores", "tokentrail_deaths", "tokentrail_reason"),
    *("tokentrail_dead_letter", "x-death"),
)
CELERY_PROPERTIES = ("reply_to", "correlation_id", "delivery_mode", "delivery_tag", "headers", "expiration", "type")


def text_values() -> st.SearchStrategy[Any]:
    return st.one_of(
        st.text(st.characters(exclude_categories=()), max_size=20),
        st.sampled_from(
            ["", "\0", "\ud800", "\u202e", "hostile", "ann", "1", "1.5", "x" * 129, "x" * 300, "burn", "accrual"]
        ),
    )


def json_values() -> st.SearchStrategy[Any]:
    leaves = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.sampled_from([10**20, 10**400, -(2**63), 2**64, raw("1e400"), raw("1e99999999999999999999"), raw("-0.0")]),
        st.floats(),
        text_values(),
        st.sampled_from([raw('{"a":1,"a":2}'), raw('{"":"","\\u0000":1}'), deep(100), deep(300), raw("NaN")]),
        st.builds(
            lambda tag, value: {"__type__": tag, "__value__": value},
            st.sampled_from(["decimal", "datetime", "date", "time", "uuid", "bytes", "base64", "set", "x"]),
            st.one_of(st.text(max_size=9), st.sampled_from(["1.5", "2026-01-31T12:00:00Z", "1E+5"]), st.integers()),
        ),
    )
    return st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text_values(), inner, max_size=3),
        max_leaves=6,
    )


def _or_invalid(good: st.SearchStrategy[Any], wild: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(good, good, good, wild)


def events(bulk: bool = False) -> st.SearchStrategy[Any]:
    """Fields of an event, some of them valid."""
    fields: dict[str, Any] = {
        "user_id": _or_invalid(text_values(), json_values()),
        "amount": st.one_of(
            st.decimals(0, 10**13, places=3).map(str), st.integers(0, 10**6), st.sampled_from(INVALID["amount"])
        ),
        "idempotency_key": _or_invalid(st.integers(0, 10**9).map(str), json_values()),
    }
    optional: dict[str, Any] = {
        "action": _or_invalid(text_values(), json_values()),
        "source": text_values(),
        "occurred_at": st.datetimes().map(lambda at: f"{at.isoformat()}Z") | st.sampled_from(INVALID["occurred_at"]),
        "metadata": st.dictionaries(text_values(), json_values(), max_size=3) | st.sampled_from(INVALID["metadata"]),
    }
    if bulk:
        optional["type"] = st.sampled_from(["accrual", "burn", "burn", None, "x"])
    return st.fixed_dictionaries(fields, optional=optional) | json_values()


def calls() -> st.SearchStrategy[str]:
    return st.one_of(
        events().map(call),
        events().map(call),
        st.lists(events(bulk=True), max_size=4).map(lambda each: call({"events": each})),
        st.builds(call, json_values(), json_values(), json_values()),
        json_values().map(dumps),
        st.builds(
            lambda task, identity, kwargs: dumps({"task": task, "id": identity, "args": [], "kwargs": kwargs}),
            tasks(),
            json_values(),
            events(),
        ),
        st.text(max_size=30),
    )


def tasks() -> st.SearchStrategy[Any]:
    registered = ["tokens.burn", "tokens.accrue", "tokens.apply_many"]
    return _or_invalid(
        st.sampled_from(registered), st.sampled_from(["tokentrail.undecodable", "x", "", None]) | json_values()
    )


def messages() -> st.SearchStrategy[bytes]:
    named = st.builds(
        lambda task, identity, more: {"task": task, "id": identity} | more,
        tasks(),
        st.uuids().map(str) | json_values(),
        st.dictionaries(
            st.sampled_from([*CELERY_HEADERS, "eta", "expires", "compression"]) | text_values(),
            json_values(),
            max_size=3,
        ),
    )
    places = st.builds(
        properties,
        priority=json_values(),
        delivery_info=_or_invalid(st.just({"exchange": "", "routing_key": "tokens"}), json_values()),
        body_encoding=_or_invalid(st.just("base64"), json_values()),
        delivery_tag=json_values(),
        reply_to=json_values(),
        correlation_id=json_values(),
    )
    content = st.fixed_dictionaries(
        {},
        optional={
            "content-type": st.sampled_from(
                ["application/x-python-serialize", "application/x-yaml", "text/plain", None]
            ),
            "content-encoding": st.sampled_from(["binary", "utf-16", "us-ascii", None, 5]),
        },
    )
    whole = st.builds(
        lambda body, head, place, more: message(body, head, **({"properties": place} if place else {}), **more),
        calls(),
        named,
        st.one_of(st.none(), st.none(), places),
        st.one_of(st.just({}), st.just({}), st.just({}), content),
    )
    shapeless = st.fixed_dictionaries(
        {},
        optional={
            name: json_values() for name in ("body", "headers", "properties", "content-type", "content-encoding")
        },
    ).map(lambda fields: dumps(fields).encode(errors="surrogatepass"))
    return st.one_of(
        whole,
        whole,
        whole,
        whole,
        calls().map(message),
        shapeless,
        json_values().map(dumps).map(str.encode),
        st.binary(),
    )


def generated(amount: int, seed_: int, portion: int = 5_000) -> Iterator[list[bytes]]:
    """`amount` messages in portions: hypothesis generates them, and each is mutated MUTANTS times."""
    chance, serial = random.Random(seed_), count()
    while amount > 0:
        batch = [
            variant
            for original in _draw(min(amount, portion) // (1 + MUTANTS) + 1, seed_)
            for variant in (original, *(mutated(original, chance, next(serial)) for _ in range(MUTANTS)))
        ][:amount]
        amount, seed_ = amount - len(batch), seed_ + 1
        yield batch


def _draw(amount: int, seed_: int) -> list[bytes]:
    drawn: list[bytes] = []

    @seed(seed_)
    @settings(
        max_examples=amount,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(messages())
    def gather(one: bytes) -> None:
        drawn.append(one)

    gather()
    return drawn


_SPLICES = [
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\\",
    b"\0",
    b"\xff",
    b"\\ud800",
    b"1e999",
    b"NaN",
    b"null",
    b"-",
    b"0",
]


def mutated(one: bytes, chance: random.Random, serial: int) -> bytes:
    """The message with some bytes changed; where its body is in base64, mostly inside that."""
    inside = re.search(rb'"body": "((?:[A-Za-z0-9+/]{4}){2,}(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?)"', one)
    if inside and chance.random() < 0.6:
        body = _changed(base64.b64decode(inside[1]), chance).replace(b'"k"', b'"k%d"' % serial)
        return one[: inside.start(1)] + base64.b64encode(body) + one[inside.end(1) :]
    return _changed(one, chance)


def _changed(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        at = chance.randrange(len(changed) + 1)
        match chance.randrange(4):
            case 0:
                changed[at : at + 1] = bytes([chance.randrange(256)])
            case 1:
                del changed[at : at + chance.choice((1, 1, 4, 40))]
            case 2:
                changed[at:at] = chance.choice(_SPLICES)
            case 3:
                start = chance.randrange(len(changed) + 1)
                changed[at:at] = changed[start : start + chance.randrange(1, 30)]
    return bytes(changed)

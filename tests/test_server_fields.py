"""Typed reading of request bodies."""

import pytest

from gptoss_jax.server.errors import ApiError
from gptoss_jax.server.fields import Fields, parse_json, shown


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (b"", None, "The body is not JSON"),
        (b"[1]", None, "The body is [1]: must be a JSON object"),
        (b'{"a": NaN}', None, "NaN is not a finite number"),
        (b'{"a": [-Infinity]}', None, "-Infinity is not a finite number"),
        (b'{"a": 1e999}', None, "1e999 is not a finite number"),
        (b"null", None, "The body is null: must be a JSON object"),
        (b'{"a": ' + b"9" * 5000 + b"}", None, "string conversion: value has 5000 digits."),
        (b'{"a": "\xff"}', None, "The body is not UTF-8: invalid byte at 7"),
        (b'{"a": 1, "b": 2, "a": 3}', "a", '"a" occurs more than once'),
        (b'{"a": [{"b": "\\ud800"}]}', "a[0].b", "a[0].b contains a lone surrogate"),
        (b'{"a": {"\\udc00": 1}}', "a", "A key contains a lone surrogate"),
        (
            b'{"a": ' + b"[" * 70 + b"]" * 70 + b"}",
            "a[0][0][0][0][0][0][0]",
            "nested more than 64 levels deep",
        ),
        (b"[" * 200000, None, "nested more than 64 levels deep"),
    ],
)
def test_bodies_that_are_refused(body, param, words):
    with pytest.raises(ApiError) as caught:
        parse_json(body)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert words in caught.value.message


def test_bodies_that_are_accepted():
    assert parse_json(b'{"a": "\\ud83d\\ude00", "b": null}').values == {"a": "\U0001f600", "b": None}
    deep = b'{"a": ' + b"[" * 63 + b"]" * 63 + b"}"
    assert parse_json(deep).values


@pytest.mark.parametrize(
    ("read", "value", "expected"),
    [
        (lambda f: f.text("x", "d"), None, "d"),
        (lambda f: f.text("x"), "é", "é"),
        (lambda f: f.boolean("x", True), None, True),
        (lambda f: f.integer("x", 3, 1, 5), 5.0, 5),
        (lambda f: f.number("x", low=0), 2, 2.0),
        (lambda f: f.choice("x", ("a", "b")), "b", "b"),
        (lambda f: f.texts("x"), "a", ("a",)),
        (lambda f: f.texts("x"), ["a", "b"], ("a", "b")),
        (lambda f: f.object("x").integer("y"), {"y": 1}, 1),
        (lambda f: [one.path for one in f.objects("x")], [{}, {}], ["x[0]", "x[1]"]),
    ],
)
def test_values(read, value, expected):
    assert read(Fields({"x": value})) == expected


@pytest.mark.parametrize(
    ("read", "value", "message"),
    [
        (lambda f: f.text("x"), 1, "m[0].x is 1: must be a string"),
        (lambda f: f.boolean("x"), "true", 'm[0].x is "true": must be true or false'),
        (lambda f: f.integer("x", low=1, high=5), 6, "m[0].x is 6: must be an integer from 1 to 5"),
        (lambda f: f.integer("x", low=1), True, "m[0].x is true: must be an integer, 1 or more"),
        (lambda f: f.number("x", high=2), [], "m[0].x is []: must be a number, at most 2"),
        (lambda f: f.number("x"), 10**400, "m[0].x is an integer with more than 64 bits: must be a number"),
        (lambda f: f.choice("x", ("a", "b")), ["a"], 'm[0].x is ["a"]: must be one of a, b'),
        (lambda f: f.texts("x"), ["a", 1], "must be a string or a list of strings"),
        (lambda f: f.object("x"), [], "m[0].x is []: must be an object"),
        (lambda f: f.array("x"), {}, "m[0].x is {}: must be a list"),
        (lambda f: f.refuse({"x": (False, [])}), [1], "m[0].x is [1]: not supported"),
    ],
)
def test_faults(read, value, message):
    with pytest.raises(ApiError) as caught:
        read(Fields({"x": value}, "m[0]"))
    assert message in caught.value.message
    assert caught.value.param == "m[0].x"


def test_items_that_are_not_objects():
    with pytest.raises(ApiError, match=r"x\[1\] is 5: must be an object") as caught:
        Fields({"x": [{}, 5]}).objects("x")
    assert caught.value.param == "x[1]"


def test_missing_fields():
    with pytest.raises(ApiError, match="x is missing") as caught:
        Fields({"x": None}).needed("x")
    assert caught.value.code == "missing_required_parameter"


def test_values_in_messages_are_short_and_ascii():
    assert shown("\x1b[2J\u202e" + "a" * 100) == '"\\u001b[2J\\u202e' + "a" * 44 + "…"
    assert shown(list(range(100))) == "a list of 100 items"
    assert shown({"a": 1}) == '{"a": 1}'

"""Grammars of answers: what they allow, and that whatever a model picks among it is valid."""

import dataclasses
import json
import re

import jsonschema
import numpy as np
import pytest
from helpers.grammars import sample
from helpers.scripted_engine import encode_special, tiny_tokenizer

from gptoss_jax.data.harmony import Harmony
from gptoss_jax.inference.engine import Engine
from gptoss_jax.inference.grammar import GrammarMatcher
from gptoss_jax.inference.sampling import num_mask_words
from gptoss_jax.inference.sampling_params import Completion, SamplingParams
from gptoss_jax.model.transformer import bind
from gptoss_jax.server.answer_grammar import answer_grammar
from gptoss_jax.server.answers import AnswerReader
from gptoss_jax.server.errors import ApiError
from gptoss_jax.server.fields import Fields
from gptoss_jax.server.response_format import ResponseFormat, read_response_format
from gptoss_jax.server.tools import Function, Tools

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}
THOUGHT = "<|channel|>analysis<|message|>So\n{.<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>"
CALL = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>"


@pytest.fixture(scope="module")
def tiny():
    return tiny_tokenizer()


def tools(*functions, mode="auto", allowed=None):
    return Tools(functions, mode, functions if allowed is None else allowed)


def allows(tokenizer, grammar, text):
    """True if the masks allow a whole answer and nothing after it."""
    vocab_size = tokenizer.vocab_size + 40
    matcher, row = (
        GrammarMatcher(tokenizer, vocab_size, grammar),
        np.zeros(num_mask_words(vocab_size), np.int32),
    )
    for token in encode_special(tokenizer, text):
        matcher.fill_mask(row)
        if not (row[token // 32] >> (token % 32)) & 1:
            return False
        matcher.accept(token)
    return matcher.is_finished


@pytest.mark.parametrize("kind", ["tiny", "harmony"])
def test_a_format_binds_the_final_message_and_leaves_reasoning_free(kind, request):
    tokenizer = request.getfixturevalue(kind)
    grammar = answer_grammar(tokenizer, tokenizer.vocab_size + 40, Tools(), ResponseFormat("r", SCHEMA))
    for answer in [
        f'{FINAL}{{"a":1}}<|return|>',
        f'{THOUGHT}{FINAL}{{"a": 12}}<|return|>',
        f'{THOUGHT}{THOUGHT}<|channel|>final <|constrain|>json<|message|>{{\n  "a": 1\n}}<|return|>',
    ]:
        assert allows(tokenizer, grammar, answer), answer
    for answer in [
        "{",
        f"{FINAL}Sure<|return|>",
        f"{THOUGHT}{FINAL}{{}}<|return|>",
        f'{FINAL}{{"a":1}} <|return|>',
        f'{FINAL}{{"a":  1}}<|return|>',
        f'{FINAL}{{\n\n"a":1}}<|return|>',
        f"{CALL}{{}}<|call|>",
        f'{THOUGHT.replace("analysis", "commentary")}{FINAL}{{"a":1}}<|return|>',
    ]:
        assert not allows(tokenizer, grammar, answer), answer


def test_a_required_call_is_the_only_end(tiny):
    strict, free = Function("f", None, SCHEMA, strict=True), Function("g")
    grammar = answer_grammar(tiny, 400, tools(strict, free, mode="required"), None)
    for answer in [
        f'{THOUGHT}{CALL}{{"a":1}}<|call|>',
        f"{THOUGHT} to=functions.g<|channel|>commentary json<|message|>{{}}<|call|>",
        "<|channel|>analysis to=functions.g<|message|>{}<|call|>",
    ]:
        assert allows(tiny, grammar, answer), answer
    for answer in [
        f"{FINAL}Hi<|return|>",
        f"{CALL}{{}}<|call|>",
        f"{CALL.replace('.f', '.g')}[]<|call|>",
        f"{CALL.replace('.f', '.h')}{{}}<|call|>",
    ]:
        assert not allows(tiny, grammar, answer), answer
    named = answer_grammar(tiny, 400, tools(strict, free, mode="required", allowed=(strict,)), None)
    assert not allows(tiny, named, f"{CALL.replace('.f', '.g')}{{}}<|call|>")


def test_strict_tools_bind_their_arguments_only(tiny):
    grammar = answer_grammar(tiny, 400, tools(Function("f", None, SCHEMA, strict=True), Function("g")), None)
    for answer in [
        f"{THOUGHT}{FINAL}Any\ntext<|return|>",
        f'{CALL}{{"a":1}}<|call|>',
        f"{CALL.replace('.f', '.g')}not {{ JSON<|call|>",
    ]:
        assert allows(tiny, grammar, answer), answer
    assert not allows(tiny, grammar, f"{CALL}{{}}<|call|>")


def test_answers_that_may_be_anything_have_no_grammar(tiny):
    assert answer_grammar(tiny, 400, tools(Function("f", None, SCHEMA)), None) is None
    assert answer_grammar(tiny, 400, Tools(), None) is None


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"not": {}}, 'not supported: ["not"]'),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf is not supported for overlapping"),
        ({"type": "objct"}, "Invalid type: objct"),
        ({"$ref": "http://127.0.0.1/x"}, "not present in a registry"),
        ({"minProperties": 2}, "minProperties above 1 requires at least as many required properties"),
    ],
)  # fmt: skip
def test_schemas_that_cannot_be_enforced_are_refused_by_field(tiny, schema, reason):
    given = {"type": "json_schema", "json_schema": {"name": "r", "schema": schema}}
    response_format = read_response_format(Fields(given, "response_format"))
    with pytest.raises(ApiError, match=re.escape(reason)) as caught:
        answer_grammar(tiny, 400, Tools(), response_format)
    assert (caught.value.status, caught.value.param) == (400, "response_format.json_schema.schema")
    assert "\n" not in caught.value.message
    strict = Function("f", None, schema, strict=True, path="tools[0].function.parameters")
    with pytest.raises(ApiError) as caught:
        answer_grammar(tiny, 400, tools(strict), None)
    assert caught.value.param == "tools[0].function.parameters"
    free = answer_grammar(tiny, 400, tools(Function("f", None, schema), mode="required"), None)
    assert allows(tiny, free, f"{CALL}{{}}<|call|>") and not allows(tiny, free, f"{CALL}1<|call|>")


def test_a_schema_that_is_not_strict_falls_back_to_an_object(tiny):
    grammar = answer_grammar(tiny, 400, Tools(), ResponseFormat("r", {"not": {}}, strict=False))
    assert allows(tiny, grammar, f"{FINAL}{{}}<|return|>")


def test_unions_with_a_discriminator_and_unknown_formats_are_supported(tiny):
    def variant(kind):
        return {"type": "object", "properties": {"kind": {"const": kind}}, "required": ["kind"]}

    union = {"oneOf": [{"$ref": "#/$defs/A"}, variant("b")], "$defs": {"A": variant("a")}}
    schema = {"type": "object", "properties": {"x": union["oneOf"][1] | {"format": "iri"}, "y": union}}
    for one in (schema["properties"]["x"], union):
        grammar = answer_grammar(tiny, 400, Tools(), ResponseFormat("r", one))
        assert allows(tiny, grammar, f'{FINAL}{{"kind":"b"}}<|return|>')


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({}, "response_format.type"),
        ({"type": "xml"}, "response_format.type"),
        ({"type": "json_schema"}, "response_format.schema"),
        ({"type": "json_schema", "json_schema": {"schema": 3}}, "response_format.json_schema.schema"),
        (
            {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}},
            "response_format.json_schema.name",
        ),
    ],
)
def test_bad_formats_name_the_field(given, param):
    with pytest.raises(ApiError) as caught:
        read_response_format(Fields(given, "response_format"))
    assert caught.value.param == param


def test_the_format_is_shown_to_the_model():
    given = {"type": "json_schema", "name": "r", "description": "A\nB", "schema": {"type": "object"}}
    found = read_response_format(Fields(given))
    assert found.section == '# Response Formats\n\n## r\n\n// A\n// B\n{"type":"object"}'
    assert read_response_format(Fields({"type": "text"})) is None


class Schemas:
    """Random schemas with what structured outputs use: objects, lists, unions, bounds, references."""

    def __init__(self, rng):
        self._rng = rng

    def chance(self, probability=0.5):
        return self._rng.random() < probability

    def root(self):
        schema = self.object(0)
        if self.chance(0.2):
            schema["properties"]["node"] = {"anyOf": [{"$ref": "#/$defs/N"}, {"type": "null"}]}
            inner = {"anyOf": [{"type": "null"}, {"type": "boolean"}, {"$ref": "#/$defs/N"}]}
            schema["$defs"] = {"N": {**SCHEMA, "properties": {"a": inner}}}
        return schema

    def any(self, depth):
        kinds = [self.string, self.number, self.options]
        kinds += [self.object, self.array, self.union] if depth < 2 else []
        return kinds[self._rng.integers(len(kinds))](depth)

    def object(self, depth):
        names = ["a", "b c", "é", "n\n", "d/e"][: self._rng.integers(0, 6)]
        schema = {"type": "object", "properties": {name: self.any(depth + 1) for name in names}}
        schema["required"] = [name for name in names if self.chance(0.6)]
        if self.chance(0.7):
            schema["additionalProperties"] = False
        elif self.chance():
            schema["additionalProperties"] = {"type": "integer", "minimum": 0, "maximum": 99}
        return schema

    def array(self, depth):
        low = int(self._rng.integers(0, 2))
        return {"type": "array", "items": self.any(depth + 1), "minItems": low, "maxItems": low + 2}

    def union(self, depth):
        return {"anyOf": [self.any(depth + 1), {"type": "null"}, self.any(depth + 1)]}

    def string(self, depth):
        forms = [
            {"maxLength": 3},
            {"minLength": 1, "maxLength": 4},
            {"pattern": "^[a-c]{1,3}x?$"},
            {"format": "date"},
        ]
        return {"type": "string", **forms[self._rng.integers(len(forms))]}

    def number(self, depth):
        low = int(self._rng.integers(-20, 20))
        forms = [{"minimum": low}, {"maximum": low + 50, "minimum": low}, {"exclusiveMinimum": low}, {}]
        return {"type": ["integer", "number"][self._rng.integers(2)], **forms[self._rng.integers(len(forms))]}

    def options(self, depth):
        return [{"enum": ["x", 'q"\\', 3, None]}, {"const": {"k": [1]}}, {"type": "boolean"}][
            self._rng.integers(3)
        ]


@pytest.mark.parametrize("number", [30, pytest.param(300, marks=pytest.mark.slow)])
def test_whatever_the_model_picks_validates(tiny, number):
    rng, num_finished = np.random.default_rng(number), 0
    for i in range(number):
        schema = Schemas(rng).root()
        function = Function("f", None, schema, strict=bool(rng.integers(2)))
        is_call = i % 3 == 0
        chosen = tools(function, mode="required") if is_call else Tools()
        grammar = answer_grammar(tiny, 400, chosen, None if is_call else ResponseFormat("r", schema))
        tokens, is_finished = sample(tiny, grammar, rng, 2000)
        num_finished += is_finished
        if not is_finished:
            continue
        reader = AnswerReader(Harmony(tiny), chosen.names)
        deltas = reader.feed(Completion(tokens[:-1], None, "stop", stop_token=tokens[-1]))
        last = [delta for delta in deltas if delta.channel == "final" or delta.kind == "call"]
        assert (len(last), reader.finish_reason) == (1, "tool_calls" if is_call else "stop")
        jsonschema.Draft202012Validator(schema).validate(json.loads(last[0].text))
    assert num_finished > 0.8 * number


@pytest.mark.slow
def test_answers_of_random_weights_validate(tiny, tiny_config, random_params):
    """Through the engine, with other requests in the same batch."""
    config = dataclasses.replace(tiny_config, vocab_size=tiny.vocab_size + 9, max_position_embeddings=2048)
    engine = Engine(bind(config, random_params(config)), tiny, num_slots=8)
    rng, schemas, answers = np.random.default_rng(5), {}, {}
    for i in range(300):
        schema, is_call = Schemas(rng).root(), i % 2 == 0
        chosen = tools(Function("f", None, schema, strict=True), mode="required") if is_call else Tools()
        grammar = answer_grammar(tiny, config.vocab_size, chosen, ResponseFormat("r", schema))
        params = SamplingParams(max_new_tokens=1000, temperature=3.0, seed=i, grammar=grammar)
        params = dataclasses.replace(params, stop_tokens=tiny.stop_ids)
        request = engine.submit(tiny.encode("the fox"), params)
        schemas[request] = schema, AnswerReader(Harmony(tiny), chosen.names), is_call
        engine.submit(tiny.encode("the dog"), SamplingParams(max_new_tokens=20))
    while engine.has_work:
        for request, part in engine.step():
            if request in schemas:
                answers.setdefault(request, []).extend(schemas[request][1].feed(part))
    finished = [request for request in schemas if schemas[request][1].finish_reason != "length"]
    assert len(finished) > 150
    for request in finished:
        schema, reader, is_call = schemas[request]
        assert reader.finish_reason == ("tool_calls" if is_call else "stop")
        last = [delta for delta in answers[request] if delta.kind == "call" or delta.channel == "final"]
        text = "".join(delta.text for delta in last)
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))

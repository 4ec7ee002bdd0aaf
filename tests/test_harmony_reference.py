"""Harmony's rendering, tools and headers against openai-harmony, in gpt-oss's vocabulary."""

import base64
import json
import re

import openai_harmony as library
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_jax.data.harmony import (
    CHANNELS,
    Harmony,
    Message,
    developer,
    system,
    user,
    without_old_analysis,
)
from gptoss_jax.server.readable_schema import readable_schema

RANKS = 199998


@pytest.fixture(scope="module")
def encoding(harmony, tmp_path_factory):
    """openai-harmony's encoding, with the ranks of our tokenizer."""
    folder = tmp_path_factory.mktemp("ranks")
    lines = (b"%s %d\n" % (base64.b64encode(harmony.decode_bytes([rank])), rank) for rank in range(RANKS))
    (folder / "o200k_base.tiktoken").write_bytes(b"".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_ENCODINGS_BASE", str(folder))
        yield library.load_harmony_encoding(library.HarmonyEncodingName.HARMONY_GPT_OSS)


@pytest.fixture(scope="module")
def ours(harmony):
    return Harmony(harmony)


def theirs_of(message):
    roles = {role.value: role for role in library.Role}
    if message.role in roles:
        author = library.Author(role=roles[message.role])
    else:
        author = library.Author.new(library.Role.TOOL, message.role)
    result = library.Message.from_author_and_content(author, message.text)
    result.channel, result.recipient = message.channel, message.recipient
    result.content_type = message.content_type
    return result


def their_tools(instructions, functions):
    content = library.DeveloperContent(instructions=instructions)
    if functions:
        content = content.with_function_tools(
            [
                library.ToolDescription.new(one["name"], one.get("description", ""), one.get("parameters"))
                for one in functions
            ]
        )
    return library.Message.from_role_and_content(library.Role.DEVELOPER, content)


def their_system(effort, date):
    content = library.SystemContent(
        reasoning_effort=library.ReasoningEffort[effort.upper()], conversation_start_date=date
    )
    return library.Message.from_role_and_content(library.Role.SYSTEM, content)


def their_prompt(encoding, messages):
    keep = library.RenderConversationConfig(auto_drop_analysis=False)
    conversation = library.Conversation.from_messages(messages)
    return encoding.render_conversation_for_completion(conversation, library.Role.ASSISTANT, keep)


WEATHER = {
    "name": "get_weather",
    "description": "Gets the weather.\nIn a city.\r\n\n",
    "parameters": {
        "type": "object",
        "description": "Where.",
        "properties": {
            "city": {"type": "string", "title": "City", "description": "The city.", "examples": ["Rome", 3]},
            "unit": {"type": "string", "enum": ["c", "f"], "default": "c"},
            "days": {"type": ["integer", "string"], "default": 1, "nullable": True},
            "where": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]},
            "tags": {"type": "array", "items": {"type": "string"}},
            "any": {},
            "at": {
                "description": "When.",
                "default": "now",
                "oneOf": [
                    {"type": "string", "description": "When.", "default": "now"},
                    {"type": "integer", "description": "Seconds.", "nullable": True},
                ],
            },
        },
        "required": ["city"],
    },
}
EMPTY = {"name": "g", "parameters": {"type": "object", "properties": {}}}
TEXTS = st.text(max_size=12) | st.sampled_from(["<|end|>", " a\n", "2 + 2?", "<|start|>assistant"])
SCALARS = st.none() | st.booleans() | st.integers(-9, 999) | st.sampled_from([0.5, 1.0]) | TEXTS
NAMES = st.text(alphabet="abx_", min_size=1, max_size=3)


def optional(**fields):
    return st.fixed_dictionaries({}, optional=fields)


LEAVES = optional(
    type=st.sampled_from(["string", "number", "integer", "boolean", "array", "object", "null"])
    | st.lists(st.sampled_from(["string", "integer", "null"]), max_size=3),
    title=TEXTS,
    description=TEXTS,
    default=SCALARS | st.lists(SCALARS, max_size=2),
    nullable=st.booleans(),
    enum=st.lists(TEXTS | st.integers(), max_size=3),
    examples=st.lists(TEXTS | st.integers(), max_size=2),
    required=st.lists(NAMES, max_size=2),
)


def nested(inner):
    parts = optional(
        properties=st.dictionaries(NAMES, inner, max_size=3),
        items=inner,
        oneOf=st.lists(inner, max_size=3) | st.just("no list"),
    )
    return st.builds(lambda one, other: {**one, **other}, LEAVES, parts)


SCHEMAS = st.recursive(LEAVES | st.booleans(), nested, max_leaves=8)


def without_null(values):
    return {name: value for name, value in values.items() if value is not None}


def test_tools_in_the_developer_message(ours, encoding):
    functions = [WEATHER, EMPTY, {"name": "h", "description": ""}]
    expected = their_prompt(
        encoding, [their_system("low", "2026-01-31"), their_tools("Be brief.", functions)]
    )
    found = ours.render([system("low", "2026-01-31", has_functions=True), developer("Be brief.", functions)])
    assert found == expected
    text = developer(None, [EMPTY, {"name": "h"}]).text
    assert text == (
        "# Tools\n\n## functions\n\nnamespace functions {\n\ntype g = (_: {\n}) => any;\n\n"
        "type h = () => any;\n\n} // namespace functions"
    )


@settings(deadline=None, max_examples=300)
@given(parameters=nested(SCHEMAS), description=TEXTS)
def test_any_schema_is_written_as_the_reference_does(ours, encoding, parameters, description):
    # The library takes no null, nor do rows: there it means absent.
    parameters = json.loads(json.dumps(parameters), object_hook=without_null)
    functions = [{"name": "f", "description": description, "parameters": parameters}]
    assert ours.render([developer("", functions)]) == their_prompt(encoding, [their_tools("", functions)])


def with_references(inner):
    """Schemas with the keywords that the reference writes as `any`."""
    variants = st.lists(inner | st.just({"type": "null"}), min_size=1, max_size=3)
    return optional(
        anyOf=variants,
        allOf=variants,
        const=SCALARS,
        properties=st.dictionaries(NAMES, inner | st.just({"$ref": "#"}), max_size=3),
    )


@settings(deadline=None, max_examples=100)
@given(parameters=with_references(SCHEMAS | with_references(LEAVES)))
def test_readable_schemas_are_written_as_the_reference_does(ours, encoding, parameters):
    functions = [{"name": "f", "parameters": readable_schema(parameters)}]
    assert ours.render([developer("", functions)]) == their_prompt(encoding, [their_tools("", functions)])


MESSAGES = st.builds(user, TEXTS) | st.builds(
    Message,
    role=st.sampled_from(["assistant", "functions.f", "browser.open"]),
    text=TEXTS,
    channel=st.sampled_from([None, *CHANNELS]),
    recipient=st.sampled_from([None, "functions.f", "assistant", "all"]),
    content_type=st.sampled_from([None, "json", "<|constrain|>json", "<|constrain|>"]),
)


@settings(deadline=None, max_examples=200)
@given(messages=st.lists(MESSAGES, max_size=6))
def test_any_conversation_is_rendered_as_the_reference_does(ours, encoding, messages):
    shown = [theirs_of(message) for message in without_old_analysis(messages)]
    assert ours.render(messages) == their_prompt(encoding, shown)


def their_header(encoding, ours, tokens):
    """The assistant's header by openai-harmony's parser, without what it takes for one by mistake."""
    has_role = tokens[0] == 200006
    parser = library.StreamableParser(encoding, None if has_role else library.Role.ASSISTANT)
    try:
        for token in tokens:
            parser.process(token)
    except library.HarmonyError:
        return None
    recipient, content_type = parser.current_recipient, parser.current_content_type
    written = b"".join(map(ours.spelled, tokens)).decode(errors="replace")
    is_named = recipient is None or (recipient and re.search(rf"(?<!\S)to={re.escape(recipient)}", written))
    if recipient and content_type is None and not is_named:
        # It parses a single word as a recipient, also that of `final <|constrain|>json`.
        recipient, content_type, is_named = None, recipient, True
    fits = (
        parser.current_role == library.Role.ASSISTANT
        and parser.current_channel in (None, *CHANNELS)
        and is_named
        # It parses a misplaced marker as part of a word.
        and "<|" not in (recipient or "") + (content_type or "").removeprefix("<|constrain|>")
    )
    return (parser.current_channel, recipient, content_type) if fits else None


WORDS = [
    "assistant",
    "user",
    "analysis",
    "final",
    "commentary",
    " to=f.x",
    "to=",
    " json",
    "apple",
    " ",
    "\n",
]
MARKS = ["<|channel|>", "<|channel|>final", "<|constrain|>", "<|constrain|>json", "<|end|>", "é"]


@settings(deadline=None, max_examples=500)
@given(words=st.lists(st.sampled_from(WORDS + MARKS), max_size=6), has_role=st.booleans())
def test_any_header_is_parsed_as_by_the_reference(harmony, ours, encoding, words, has_role):
    tokens = [200006, *harmony.encode("assistant")] if has_role else []
    for piece in re.split(r"(<\|\w+\|>)", "".join(words)):
        special = harmony.special_tokens.get(piece)
        tokens += harmony.encode(piece) if special is None else [special]
    tokens = [token for token in tokens if token != 200007] + [200008]
    found = ours.header(tokens)
    assert (found and (found.channel, found.recipient, found.content_type)) == their_header(
        encoding, ours, tokens
    )

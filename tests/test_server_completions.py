"""`/v1/completions` over a scripted engine, through the openai client and its pydantic models."""

import json

import openai
import pytest
from helpers.scripted_engine import ScriptedEngine, logprob, scripted_service, tiny_tokenizer
from openai.types import Completion
from starlette.testclient import TestClient

from gptoss_jax.server.app import create_app
from gptoss_jax.server.service import Settings

TOKENIZER = tiny_tokenizer()
TEXT = "hello world says the quick fox"
ANSWER = TOKENIZER.encode(TEXT)


@pytest.fixture
def start():
    """(script, settings, engine's arguments) -> an openai client, the engine, and an HTTP client."""
    clients = []

    def make(script=ANSWER, settings=Settings(), **engine):  # noqa: B008
        scripted = ScriptedEngine(script, **engine)
        http = TestClient(create_app(scripted_service(scripted, TOKENIZER, settings=settings)))
        clients.append(http)
        http.__enter__()
        client = openai.OpenAI(
            base_url="http://testserver/v1", api_key="none", http_client=http, max_retries=0
        )
        return client, scripted, http

    yield make
    for one in clients:
        one.__exit__(None, None, None)


def validate(answer):
    """Checks an answer with pydantic. The API's null is not in openai's types: the first token of an echo has
    no log-probability, and a chunk no reason to finish."""
    values = answer.model_dump()
    for choice in values["choices"]:
        choice["finish_reason"] = choice["finish_reason"] or "stop"
        for name in ("token_logprobs", "top_logprobs") if choice["logprobs"] else ():
            choice["logprobs"][name] = [value for value in choice["logprobs"][name] if value is not None]
    Completion.model_validate(values)


def complete(client, **fields):
    answer = client.completions.create(**{"model": "tiny", "prompt": "the fox", "max_tokens": 99, **fields})
    validate(answer)
    return answer


def test_an_answer(start):
    client, engine, _ = start(cached_tokens=2)
    answer = complete(client)
    assert answer.choices[0].text == TEXT
    assert answer.choices[0].finish_reason == "stop"
    prompt = [TOKENIZER.bos_id, *TOKENIZER.encode("the fox")]
    assert engine.requests[0].prompt == prompt
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == len(ANSWER)
    assert answer.usage.prompt_tokens_details.cached_tokens == 2
    assert answer.system_fingerprint == "fp_test"
    assert answer.seed == engine.requests[0].params.seed


def test_the_stop_token_counts_as_sampled_and_is_not_text(start):
    client, _, _ = start([*ANSWER, TOKENIZER.eos_id, *ANSWER])
    answer = complete(client)
    assert (answer.choices[0].text, answer.usage.completion_tokens) == (TEXT, len(ANSWER) + 1)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_a_stream_has_the_same_answer(start, chunk):
    client, _, _ = start(chunk=chunk)
    fields = {"stream": True, "stream_options": {"include_usage": True}, "logprobs": 1, "seed": 5}
    chunks = list(client.completions.create(model="tiny", prompt="a", max_tokens=99, **fields))
    for one in chunks:
        validate(one)
    assert "".join(one.choices[0].text for one in chunks[:-1]) == TEXT
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == len(ANSWER)
    tokens = [token for one in chunks[:-1] for token in one.choices[0].logprobs.tokens]
    assert tokens == [TOKENIZER.decode([token]) for token in ANSWER]
    assert {one.id for one in chunks} == {chunks[0].id}


def test_stream_bytes(start):
    _, _, http = start(ANSWER[:2], chunk=9)
    body = {"model": "tiny", "prompt": "a", "stream": True}
    answer = http.post("/v1/completions", json=body)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    first, done, end = answer.text.split("\n\n")
    assert json.loads(first.removeprefix("data: "))["choices"][0]["text"] == TOKENIZER.decode(ANSWER[:2])
    assert (done, end) == ("data: [DONE]", "")


def test_prompts_and_choices_are_in_order(start):
    client, engine, _ = start(lambda request: request.prompt[-1:] * request.params.max_new_tokens)
    ids = [TOKENIZER.encode(text)[0] for text in ("a", "b")]
    answer = complete(client, prompt=[[ids[0]], [ids[1]]], n=2, max_tokens=3, seed=2**32 - 1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == ["aaa", "aaa", "bbb", "bbb"]
    assert [request.params.seed for request in engine.requests] == [2**32 - 1, 0] * 2
    # Two prompts of one token, each read once.
    assert answer.usage.prompt_tokens == 2 and answer.usage.completion_tokens == 12


@pytest.mark.parametrize("prompt", ["the fox", ["the fox"], TOKENIZER.encode("the fox")])
def test_forms_of_prompts(start, prompt):
    client, engine, _ = start()
    complete(client, prompt=prompt)
    bos = [] if isinstance(prompt[0], int) else [TOKENIZER.bos_id]
    assert engine.requests[0].prompt == [*bos, *TOKENIZER.encode("the fox")]


def test_special_tokens_in_prompts(start):
    client, engine, _ = start()
    complete(client, prompt="<|start|>user")
    complete(client, prompt="<|start|>user", extra_body={"parse_special": False, "add_special_tokens": False})
    parsed, spelled = (request.prompt for request in engine.requests)
    assert parsed == [TOKENIZER.bos_id, TOKENIZER.special_tokens["<|start|>"], *TOKENIZER.encode("user")]
    assert spelled == TOKENIZER.encode("<|start|>user")


def test_echo_with_log_probabilities(start):
    client, _, _ = start()
    ids = TOKENIZER.encode("the fox")
    answer = complete(client, prompt=ids, echo=True, logprobs=2, max_tokens=1)
    (choice,) = answer.choices
    tokens = [*ids, ANSWER[0]]
    assert choice.text == "the fox" + TOKENIZER.decode(ANSWER[:1])
    assert choice.logprobs.tokens == [TOKENIZER.decode([token]) for token in tokens]
    assert choice.logprobs.token_logprobs == [None, *map(logprob, tokens[1:])]
    assert choice.logprobs.top_logprobs[0] is None
    assert len(choice.logprobs.top_logprobs[1]) == 2
    lengths = [len(TOKENIZER.decode([token])) for token in tokens]
    assert choice.logprobs.text_offset == [sum(lengths[:i]) for i in range(len(tokens))]


def test_scores_without_an_answer(start):
    client, _, _ = start()
    answer = complete(client, prompt="the fox", echo=True, logprobs=0, max_tokens=0)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == ("the fox", "length")
    prompt = [TOKENIZER.bos_id, *TOKENIZER.encode("the fox")]
    assert choice.logprobs.token_logprobs == [None, *map(logprob, prompt[1:])]
    assert choice.logprobs.text_offset[:2] == [0, 0]
    assert answer.usage.completion_tokens == 0


def test_bos_before_token_ids(start):
    client, engine, _ = start(settings=Settings(prepend_bos=True))
    ids = TOKENIZER.encode("the fox")
    answer = complete(client, prompt=ids, echo=True, logprobs=0, max_tokens=1)
    assert engine.requests[0].prompt == [TOKENIZER.bos_id, *ids]
    assert answer.choices[0].logprobs.token_logprobs == list(map(logprob, [*ids, ANSWER[0]]))


@pytest.mark.parametrize("chunk", [1, 2, 50])
@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings(start, chunk, stream):
    client, engine, _ = start(chunk=chunk)
    fields = {"model": "tiny", "prompt": "a", "max_tokens": 99, "stop": ["quick"], "logprobs": 0}
    answer = client.completions.create(stream=stream, **fields)
    chunks = list(answer) if stream else [answer]
    assert "".join(one.choices[0].text for one in chunks) == "hello world says the "
    assert chunks[-1].choices[0].finish_reason == "stop"
    tokens = [token for one in chunks for token in one.choices[0].logprobs.tokens]
    # The last token begins in the text, with a space.
    assert "".join(tokens) == "hello world says the quick"
    assert engine.requests[0].params.stop_strings == ("quick",)


def test_a_stop_string_that_is_a_special_token(start):
    end = TOKENIZER.special_tokens["<|end|>"]
    client, _, _ = start([*ANSWER, end, *ANSWER])
    assert complete(client, stop="<|end|>").choices[0].text == TEXT


def test_special_tokens_in_an_answer(start):
    end = TOKENIZER.special_tokens["<|end|>"]
    client, _, _ = start([ANSWER[0], end, 500, ANSWER[1]])
    texts = [TOKENIZER.decode([token]) for token in ANSWER[:2]]
    assert complete(client).choices[0].text == "".join(texts)
    fields = {"skip_special_tokens": False, "return_token_ids": True}
    choice = complete(client, extra_body=fields, prompt=[7]).choices[0]
    assert choice.text == f"{texts[0]}<|end|><|reserved_500|>{texts[1]}"
    assert choice.token_ids == [ANSWER[0], end, 500, ANSWER[1]]
    assert choice.prompt_token_ids == [7]


def test_characters_of_several_tokens(start):
    euro = [TOKENIZER._token_bytes.index(bytes([byte])) for byte in "€".encode()]
    client, _, _ = start([*euro, euro[0]], chunk=1)
    chunks = list(client.completions.create(model="tiny", prompt="a", stream=True, logprobs=0))
    assert "".join(one.choices[0].text for one in chunks) == "€\ufffd"
    tokens = [token for one in chunks for token in one.choices[0].logprobs.tokens]
    assert tokens == ["bytes:\\xe2", "bytes:\\x82", "bytes:\\xac", "bytes:\\xe2"]


def test_sampling_settings(start):
    client, engine, _ = start()
    fields = {"temperature": 0.5, "top_p": 0.9, "presence_penalty": 1, "frequency_penalty": -1, "seed": -1}
    extra = {"top_k": 7, "min_p": 0.1, "stop_token_ids": [9], "ignore_eos": True, "cache_salt": "x"}
    complete(client, logit_bias={"5": 3, "2": -100}, extra_body=extra, **fields)
    params = engine.requests[0].params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 7, 0.1)
    assert (params.presence_penalty, params.frequency_penalty) == (1, -1)
    assert params.logit_bias == ((2, -100.0), (5, 3.0))
    assert (params.seed, params.stop_tokens) == (2**32 - 1, (9,))
    assert engine.requests[0].cache_salt == "x"


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": []}, "prompt", "must not be an empty list"),
        ({"prompt": [[]]}, "prompt[0]", "must be text or a list of token ids"),
        ({"prompt": 5}, "prompt", "prompt is 5: must be a string or a list"),
        ({"prompt": [1, 512]}, "prompt[1]", "prompt[1] is 512: a token id must be an integer from 0 to 511"),
        ({"prompt": ["a", 3]}, "prompt[1]", "must be text or a list of token ids"),
        ({"prompt": [True]}, "prompt[0]", "prompt[0] is true"),
        ({"suffix": "x"}, "suffix", 'suffix is "x": not supported'),
        (
            {"guided_regex": "a"},
            "guided_regex",
            'guided_regex is "a": not supported; use response_format of /v1/chat/completions',
        ),
        ({"best_of": 3}, "best_of", "must equal n, 1"),
        ({"n": 0}, "n", "n is 0: must be an integer from 1 to 128"),
        ({"max_tokens": "5"}, "max_tokens", 'max_tokens is "5": must be an integer'),
        ({"max_tokens": -1}, "max_tokens", "must be an integer, 1 or more"),
        ({"temperature": -0.5}, "temperature", "temperature is -0.5: must be a number from 0"),
        ({"top_p": 0}, "top_p", "must be above 0 and at most 1"),
        ({"stop": [""]}, "stop", "each must have 1 to 1024 characters"),
        ({"stop": ["a"] * 17}, "stop", "must have at most 16 strings"),
        ({"logprobs": 21}, "logprobs", "must be an integer from 0 to 20"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "must be a token id below 512"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1", "must be a number from -100 to 100"),
        ({"stream_options": {}}, "stream_options", "is only allowed with stream: true"),
        ({"stream": 1}, "stream", "stream is 1: must be true or false"),
        ({"seed": 1.5}, "seed", "must be an integer"),
    ],
)
def test_bad_fields(start, fields, param, words):
    client, _, _ = start()
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, **{"extra_body": fields})
    assert caught.value.param == param
    assert words in caught.value.body["message"]


@pytest.mark.parametrize(("prompt", "param"), [([1] * 4095, "max_tokens"), ([1] * 4096, "prompt")])
def test_prompts_that_do_not_fit(start, prompt, param):
    client, _, _ = start()
    with pytest.raises(openai.BadRequestError, match="4,096") as caught:
        complete(client, prompt=prompt)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", param)


def test_another_model(start):
    client, _, _ = start()
    with pytest.raises(openai.NotFoundError, match='"gpt-4" does not exist; this server serves "tiny"'):
        complete(client, model="gpt-4")

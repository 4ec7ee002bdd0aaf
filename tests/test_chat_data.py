"""Conversations as examples: masks, formats, rows that cannot be used."""

import json

from helpers.data import shared_data

from gptoss_jax.data.chat import make_examples
from gptoss_jax.data.chat_messages import harmony_messages
from gptoss_jax.data.chat_rows import read_conversation
from gptoss_jax.data.harmony import Harmony


def examples_of(tokenizer, row, train_on="assistant"):
    messages = harmony_messages(read_conversation(row))
    (examples,) = make_examples(Harmony(tokenizer), [messages], train_on)
    return examples


def test_published_conversations(harmony):
    vectors = json.loads(shared_data("vectors/sft_examples.json").read_text())
    assert len(vectors) == 6
    for vector in vectors:
        examples = examples_of(harmony, vector)
        assert len(examples) == len(vector["examples"]), vector["name"]
        for found, expected in zip(examples, vector["examples"], strict=True):
            assert found.tokens.tolist() == expected["tokens"], vector["name"]
            assert found.weights.tolist() == expected["trained"], vector["name"]

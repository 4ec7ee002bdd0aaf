"""Chat data for supervised fine-tuning: examples of conversations, with their loss masks.

Training matches inference. A conversation yields one example for each user turn with an answer. The history
is what the model sees at inference: without old analysis, and with <|end|> after finished answers. In the
turn itself, the loss covers the tokens that the model samples: after each `<|start|>assistant` of the prompt,
up to and including <|return|> or <|call|>, with the headers of the messages in between. Tool results are
masked.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from gptoss_jax.data.chat_messages import TrainMessage
from gptoss_jax.data.harmony import ASSISTANT, USER, Harmony, Piece, shown_messages

TrainOn = Literal["assistant", "final", "all"]


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One turn of a conversation, with its history.

    `weights` are aligned with `tokens`, each for the token as a target: 1 if it is trained on.
    """

    tokens: np.ndarray  # int32 [n]
    weights: np.ndarray  # uint8 [n]
    turn: int  # from 1, among the turns of its conversation that have an answer
    has_thinking: bool  # the turn has analysis


def needs_training(found: Sequence[TrainMessage], train_on: TrainOn) -> bool:
    """Returns True if a conversation has tokens to train on, and therefore yields an example."""
    first = next(i for i, one in enumerate(found) if one.message.role == USER)
    return any(one.is_trained and (train_on == "all" or _is_answer(one, train_on)) for one in found[first:])


def _is_answer(one: TrainMessage, train_on: TrainOn) -> bool:
    message = one.message
    return message.role == ASSISTANT and (train_on == "assistant" or message.channel == "final")


@dataclasses.dataclass(frozen=True)
class _Turn:
    """An example before it is encoded."""

    pieces: list[Piece]
    weights: list[int]  # of each piece
    turn: int
    has_thinking: bool


def _turns(harmony: Harmony, found: Sequence[TrainMessage], train_on: TrainOn) -> Iterator[_Turn]:
    """Yields the turns of a conversation that have tokens to train on."""
    messages, number = [one.message for one in found], 0
    users = [i for i, message in enumerate(messages) if message.role == USER]
    for start, stop in zip(users, [*users[1:], len(messages)], strict=True):
        answer = [i for i in range(start, stop) if messages[i].role == ASSISTANT]
        if not answer:
            continue
        number += 1
        pieces, weights, before = [], [], None
        for i in shown_messages(messages[: answer[-1] + 1]):
            message, is_last = messages[i], i == answer[-1] and messages[i].channel == "final"
            new = harmony.pieces(message, is_last)
            is_sampled = i > start and _is_answer(found[i], train_on)
            weight = int(found[i].is_trained and (is_sampled or train_on == "all"))
            # The prompt ends with <|start|>assistant, except when the model continues after its own message.
            is_prompted = before is None or before.role != ASSISTANT or before.is_call
            header = 0 if is_prompted and train_on != "all" else weight
            pieces += new
            weights += [header, header] + [weight] * (len(new) - 2)
            before = message
        weights[0] = 0  # nothing predicts the first token
        if any(weights):
            thinks = any(messages[i].channel == "analysis" for i in answer)
            yield _Turn(pieces, weights, number, thinks)


def make_examples(
    harmony: Harmony, conversations: Sequence[Sequence[TrainMessage]], train_on: TrainOn = "assistant"
) -> list[list[Example]]:
    """Returns the examples of each conversation, encoded together; empty if there is nothing to train on.

    Args:
      harmony: renders with the vocabulary of a tokenizer.
      conversations: the messages of each conversation, from `harmony_messages`.
      train_on: `assistant` trains on everything that the model samples, `final` only on final answers, `all`
        on every token, including prompts. Messages with `train: false` are never trained on.
    """
    turns = [list(_turns(harmony, found, train_on)) for found in conversations]
    encoded = iter(harmony.encode([piece for some in turns for turn in some for piece in turn.pieces]))

    def example(turn: _Turn) -> Example:
        tokens = [next(encoded) for _ in turn.pieces]
        lengths = [len(one) for one in tokens]
        return Example(
            np.fromiter(itertools.chain.from_iterable(tokens), np.int32),
            np.repeat(np.array(turn.weights, np.uint8), lengths),
            turn.turn,
            turn.has_thinking,
        )

    return [[example(turn) for turn in some] for some in turns]

"""Loops keep a bounded number of programs in flight."""

import dataclasses

import jax
import numpy as np
import pytest

from gptoss_jax.inference import prefill as prompts
from gptoss_jax.inference import slots
from gptoss_jax.inference.generate import generate
from gptoss_jax.inference.sampling_params import SamplingParams
from gptoss_jax.model.transformer import bind
from gptoss_jax.parallel import in_flight


class Queue:
    """Counts the programs that were dispatched and not waited for."""

    def __init__(self):
        self.now = self.most = 0

    def dispatched(self):
        self.now += 1
        self.most = max(self.most, self.now)

    def finished(self, count=1):
        self.now -= count


@dataclasses.dataclass(eq=False)
class Result:
    """A fake result of a program, which can be waited for."""

    queue: Queue
    number: int

    def block_until_ready(self):
        self.queue.finished()
        return self


@pytest.mark.parametrize(("backend", "most"), [("cpu", 1), ("gpu", 2), ("tpu", 2)])
def test_results_are_in_order_and_few_are_in_flight(monkeypatch, backend, most):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    queue = Queue()

    def programs():
        for number in range(20):
            queue.dispatched()
            yield Result(queue, number)

    numbers = [result.number for result in in_flight.bounded(programs())]
    assert numbers == list(range(20))
    assert (queue.now, queue.most) == (0, most)
    assert list(in_flight.bounded([])) == []


def test_a_prompt_of_many_chunks_waits_for_each(tiny_config, random_params, monkeypatch):
    queue, sizes = Queue(), []

    def prefill(config, params, rows, tokens_BT, *args, **kwargs):
        queue.dispatched()
        sizes.append(tokens_BT.shape[1])
        return rows, None

    def wait(tree):
        queue.finished(queue.now)
        return tree

    class Prefilled(Exception):
        pass

    def decode(*args):
        raise Prefilled

    monkeypatch.setattr(prompts, "CHUNK_SIZES", (8, 4))
    monkeypatch.setattr(slots, "prefill", prefill)
    monkeypatch.setattr(slots, "decode", decode)
    monkeypatch.setattr(jax, "block_until_ready", wait)
    prompt = [(7 * i) % 97 for i in range(90)]
    with pytest.raises(Prefilled):
        generate(bind(tiny_config, random_params(tiny_config)), [prompt], SamplingParams(max_new_tokens=2))
    assert sizes == [8] * 11 + [4] and queue.most == 1


def test_results_may_be_any_tree():
    double = jax.jit(lambda x: (2 * x, {"also": x + 1}))
    found = list(in_flight.bounded(double(np.float32(x)) for x in range(3)))
    assert [(float(x), float(rest["also"])) for x, rest in found] == [(0, 1), (2, 2), (4, 3)]

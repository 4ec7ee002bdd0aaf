"""A user's program: every public name has the type that its documentation gives it.

Type-checked where the wheel is installed, outside of the checkout. Not run.
"""

from collections.abc import Iterator
from typing import assert_type

import jax

import gptoss_jax as gx

model = gx.from_pretrained("folder", dtype="float32")
assert_type(model, gx.Transformer)
assert_type(model.config, gx.ModelConfig)
assert_type(model.config.hidden_size, int)
assert_type(model(jax.numpy.zeros((1, 8), "int32")), jax.Array)

params = gx.SamplingParams(max_new_tokens=8, temperature=0.6, stop_tokens=(0,))
answers = gx.generate(model, [[1, 2, 3]], params)
assert_type(answers, list[gx.Completion])
assert_type(answers[0].tokens, list[int])
assert_type(gx.stream(model, [[1, 2, 3]], params), Iterator[list[gx.Completion]])

engine = gx.Engine(model, num_slots=4)
request = engine.submit([1, 2, 3], params)
assert_type(request.tokens, list[int])
assert_type(engine.step()[0][1], gx.Completion)

config = gx.TrainConfig(steps=10)
assert_type(config.data.seq_len, int)
assert_type(gx.train(config).step, jax.Array)
gx.save_pretrained(model, "out", experts="mxfp4")

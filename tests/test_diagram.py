"""The picture of an architecture: its sizes are the config's, and all of its text can be read."""

import dataclasses
import itertools

import pytest
from matplotlib.patches import Rectangle

import gptoss_jax as gx
from gptoss_jax.planning import diagram

CONFIGS = {
    "20b": gx.ModelConfig(),
    "120b": gx.ModelConfig(num_hidden_layers=36, num_local_experts=128),
    "one layer, one head": gx.ModelConfig(
        num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, num_local_experts=1,
        num_experts_per_tok=1, rope_scaling=None, learned_sinks=False, tie_word_embeddings=True,
    ),
}  # fmt: skip


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def squares(figure, color):
    """The number of rectangles of a color."""
    patches = (patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle))
    found = (diagram.matplotlib.colors.to_hex(patch.get_facecolor()) for patch in patches)
    return sum(one == color for one in found)


@pytest.mark.parametrize("name", CONFIGS)
def test_text_is_inside_of_the_picture_and_does_not_overlap(name):
    figure = gx.draw_architecture(CONFIGS[name], "a name with a $")
    renderer = figure.canvas.get_renderer()
    figure.draw(renderer)
    shown = [text for text in figure.axes[0].texts if text.get_text()]
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in shown]
    width, height = figure.canvas.get_width_height()
    for text, box in boxes:
        assert 0 < box.x0 < box.x1 < width and 0 < box.y0 < box.y1 < height, text
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        assert not a.overlaps(b), (one, other)


def test_sizes_are_those_of_the_config():
    found = texts(gx.draw_architecture(CONFIGS["20b"]))
    assert "20.9B parameters, 3.6B of them used for a token" in found
    assert "embedding   201,088 × 2,880" in found and "head   2,880 × 201,088" in found
    assert "64 query heads above 8 heads of keys and values, each shared by 8" in found
    assert "heads of 64   ·   RoPE, θ = 150,000, YaRN × 32" in found
    assert "12 layers: latest 128 tokens" in found and "12 layers: all earlier tokens" in found
    one = texts(gx.draw_architecture(CONFIGS["one layer, one head"]))
    assert "1 layer: latest 128 tokens" in one and "0 layers: all earlier tokens" in one
    assert "32 experts per layer, 4 for each token" in found
    assert "block 0   sliding window" in found and "block 23   full attention" in found


def test_draws_what_the_config_has():
    config = dataclasses.replace(CONFIGS["20b"], num_local_experts=13, num_experts_per_tok=3)
    figure = gx.draw_architecture(config)
    full_mask = 12 * 13 // 2
    assert squares(figure, diagram.ORANGE) == full_mask + 3 and squares(figure, diagram.LIGHT_ORANGE) == 10
    assert squares(figure, diagram.TEXT) == 24  # a sink for each query of both masks
    assert "sink" in texts(figure)
    assert "sink" not in texts(gx.draw_architecture(CONFIGS["one layer, one head"]))

"""Base models in Hugging Face formats."""

import jax

from gptoss_jax.checkpoints.export import save_pretrained
from gptoss_jax.data.tokenizer import make_tokenizer
from gptoss_jax.model.transformer import bind, init_params


def base_maker(folder, config):
    """Returns (form) -> a folder with a random model of this config and the tokenizer of bytes."""
    model = bind(config, init_params(config, jax.random.key(3)))
    (folder / "tokenizer").mkdir()
    make_tokenizer("bytes").save(folder / "tokenizer")

    def make(form):
        if not (folder / form).exists():
            save_pretrained(model, folder / form, form, tokenizer=folder / "tokenizer")
        return folder / form

    return make

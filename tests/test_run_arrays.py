"""Runs read slice by slice: the chunks of their checkpoints, the bytes that are written, and damage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.weights import one_line, tensors_of

from gptoss_jax.checkpoints import run
from gptoss_jax.checkpoints.export import convert, write_folder
from gptoss_jax.checkpoints.readers import InMemoryReader, open_weights
from gptoss_jax.checkpoints.run import Checkpoints
from gptoss_jax.checkpoints.run_arrays import StoredTensor
from gptoss_jax.checkpoints.run_params import open_params, read_checkpoint
from gptoss_jax.config import DataConfig, MeshConfig, ModelConfig, TrainConfig
from gptoss_jax.data.tokenizer import make_tokenizer
from gptoss_jax.model.parameters import parameter_shardings
from gptoss_jax.model.transformer import init_params
from gptoss_jax.parallel.mesh import make_mesh

MODEL = ModelConfig(
    num_hidden_layers=4,
    vocab_size=258,
    hidden_size=96,
    intermediate_size=64,
    num_local_experts=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)


def save_run(folder, mesh=None):
    folder.mkdir()
    config = TrainConfig(model=MODEL, data=DataConfig(seq_len=64), run_dir=str(folder))
    config.save(folder / "config.json")
    make_tokenizer("bytes").save(folder)
    params = init_params(MODEL, jax.random.key(5))
    # Biases and norms are constant at first.
    params = jax.tree.map(
        lambda leaf: leaf + 0.01 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), params
    )
    if mesh is not None:
        params = jax.device_put(params, parameter_shardings(params, mesh))
    checkpoints = Checkpoints(folder)
    checkpoints.save(3, params, {"step": jnp.array(3)}, {"step": 3})
    checkpoints.close()
    return folder


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("runs") / "run")


def chunk_shape(array):
    return array.store.chunk_layout.read_chunk.shape


def test_layers_and_experts_are_chunks_of_their_own(a_run):
    _, base, params = open_params(a_run)
    assert base is None
    block = params["blocks"]["1"]
    assert chunk_shape(block["moe"]["gate_up"]) == (1, 1, 96, 2, 64)
    assert chunk_shape(block["moe"]["down_bias"]) == (1, 1, 96)
    assert chunk_shape(block["attention"]["q"]) == (1, 96, 4, 16)
    assert chunk_shape(block["attention_norm"]["scale"]) == (1, 96)
    assert chunk_shape(params["embedding"]["weight"]) == (258, 96)


def whole_chunks(params):
    return jax.tree.map(lambda leaf: run.ocp.SaveArgs(), params)


@pytest.mark.parametrize("form", ["by layer", "whole", "sharded"])
@pytest.mark.parametrize("experts", ["float32", "bfloat16", "mxfp4"])
def test_streamed_run_is_written_as_one_in_memory(tmp_path, monkeypatch, form, experts):
    if form == "whole":  # as older versions stored them
        monkeypatch.setattr(run, "save_args", whole_chunks)
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2)) if form == "sharded" else None
    folder = save_run(tmp_path / "run", mesh)
    config, _, params = read_checkpoint(folder)
    write_folder(InMemoryReader(config.model, params, folder), tmp_path / "expected", experts)
    monkeypatch.setattr(Checkpoints, "restore_params", lambda *args: pytest.fail("was read as a whole"))
    convert(folder, tmp_path / "found", experts)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "found" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()
    assert len(tensors_of(tmp_path / "found")) > 50


def test_slices_of_a_layer(a_run):
    tensor = open_weights(a_run).stored("moe.gate_up", 3)
    assert isinstance(tensor, StoredTensor)
    assert tensor.shape == (6, 96, 2, 64) and tensor.dtype == np.float32
    expected = np.asarray(read_checkpoint(a_run)[2]["blocks"]["1"]["moe"]["gate_up"])[1]
    index = (slice(2, 5), slice(10, 40), slice(0, 2), slice(3, 50))
    out = np.empty((3, 30, 2, 47), np.float32)
    assert tensor.read_into(out, index)
    np.testing.assert_array_equal(out, expected[index])
    np.testing.assert_array_equal(tensor.in_memory().array, expected)
    embedding = open_weights(a_run).stored_whole("embedding.weight", -1).array
    np.testing.assert_array_equal(embedding, read_checkpoint(a_run)[2]["embedding"]["weight"])


def test_damage_is_reported_on_one_line(tmp_path):
    folder = save_run(tmp_path / "run")
    reader = open_weights(folder)
    files = [path for path in (folder / "checkpoints/3/params").rglob("d/*") if path.is_file()]
    for path in files:
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"checkpoints/3: cannot be read \(params: ") as caught:
        reader.stored_whole("moe.down", 2)
    one_line(caught)
    with pytest.raises(
        ValueError, match=r"checkpoints/3: cannot be read \(params: .*; there is no other one"
    ):
        open_weights(folder)


def test_array_of_another_shape_is_refused(tmp_path):
    folder = save_run(tmp_path / "run")
    values = (folder / "config.json").read_text()
    assert '"hidden_size": 96' in values
    (folder / "config.json").write_text(values.replace('"hidden_size": 96', '"hidden_size": 128'))
    with pytest.raises(ValueError, match=r"has shape \[2, 96, 2, 16\], not \[2, 128, 2, 16\]"):
        open_weights(folder)

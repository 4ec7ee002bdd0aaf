"""`--mesh` of generate, eval and serve: the model is split over devices, and the results stay the same."""

import json

import jax
import pytest

from gptoss_jax.checkpoints.export import save_pretrained
from gptoss_jax.cli import main
from gptoss_jax.config import ModelConfig
from gptoss_jax.data.tokenizer import make_tokenizer
from gptoss_jax.inference.sampling_params import SamplingParams
from gptoss_jax.model.transformer import bind, init_params
from gptoss_jax.parallel.mesh import use_mesh
from gptoss_jax.server.load import ServeConfig, load_service

CONFIG = ModelConfig(
    vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, num_local_experts=6, num_experts_per_tok=3, sliding_window=5,
    max_position_embeddings=64, rope_scaling=None, initializer_range=0.3, compute_dtype="float32",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("split") / "model"
    save_pretrained(bind(CONFIG, init_params(CONFIG, jax.random.key(3))), folder)
    make_tokenizer("bytes").save(folder)
    return str(folder)


def test_use_mesh():
    with use_mesh(None) as mesh:
        assert mesh is None and not jax.sharding.get_abstract_mesh().shape
    with use_mesh("tensor=2, expert=3") as mesh:
        assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "context": 1, "expert": 3, "tensor": 2}
        assert list(mesh.devices.flat) == jax.devices()[:6]
        assert dict(jax.sharding.get_abstract_mesh().shape) == dict(mesh.shape)
    with use_mesh("tensor=2,data=-1") as mesh:
        assert mesh.size == len(jax.devices()) == 8


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("tensor=16", "mesh is 'tensor=16': needs 16 devices, and this machine has 8 JAX devices"),
        ("tensr=2", "mesh is 'tensr=2': did you mean tensor? axes are data, fsdp, context, expert, tensor"),
        ("expert=4", "mesh.expert is 4: must divide model.num_local_experts (6); valid sizes: 1, 2"),
    ],
)
def test_bad_meshes(folder, capsys, mesh, message):
    assert main.main(["generate", folder, "--prompt", "a", "--mesh", mesh]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("mesh", ["expert=3,tensor=2", "context=2,expert=2"])
def test_generate(folder, capsys, mesh):
    command = ["generate", folder, "--prompt", "the", "--max-new-tokens", "12", "--temperature", "0"]
    assert main.main(command) == 0
    alone = capsys.readouterr().out
    assert main.main([*command, "--mesh", mesh]) == 0
    assert capsys.readouterr().out == alone and len(alone) > len("the\n")


def test_eval(folder, tmp_path):
    text, losses = tmp_path / "text.txt", []
    text.write_text("A first line, and more.\n" * 7)
    for mesh in ([], ["--mesh", "expert=2,tensor=2"], ["--mesh", "context=2,expert=2"]):
        command = ["eval", folder, "--source", f"text:{text}", "--context", "32", "--batch-size", "3"]
        assert main.main([*command, "--json", str(tmp_path / "result.json"), *mesh]) == 0
        losses.append(json.loads((tmp_path / "result.json").read_text())["loss"])
    assert losses[1:] == pytest.approx(losses[:1] * 2, abs=1e-5)


def test_serve(folder):
    pytest.importorskip("llguidance", reason="pip install -e '.[serve]'")
    results = []
    for mesh in (None, "tensor=2"):
        service = load_service(ServeConfig(folder, slots=3, mesh=mesh))
        engine = service.engine.engine
        request = engine.submit([1, 2, 3], SamplingParams(max_new_tokens=9))
        tokens = []
        while engine.has_work:
            for owner, part in engine.step():
                assert owner is request
                tokens += part.tokens
        results.append(tokens)
        devices = {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(engine._params)}
        assert devices == {1 if mesh is None else 2}
    assert results[0] == results[1] and len(results[0]) == 9

"""`gptoss check`, the check at first use, and the settings that turn kernels off."""

import dataclasses
import json
import threading
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.cli import check as check_command
from gptoss_jax.config import DataConfig, MeshConfig, TrainConfig
from gptoss_jax.kernels import backend, check, selection
from gptoss_jax.kernels.attention.api import AttentionSpec, attention
from gptoss_jax.kernels.check import Case, Result, check_case
from gptoss_jax.kernels.cpu import build, decode
from gptoss_jax.kernels.grouped_matmul import api
from gptoss_jax.kernels.mxfp4 import codec
from gptoss_jax.kernels.mxfp4 import pallas_triton as triton_mxfp4
from gptoss_jax.model.transformer import bind
from gptoss_jax.parallel import distributed
from gptoss_jax.parallel.mesh import make_mesh
from gptoss_jax.training.state import create_params, create_state
from gptoss_jax.training.step import make_eval_step, make_train_step

needs_compiler = pytest.mark.skipif(not build.is_available(), reason="no C++ compiler here")


@pytest.mark.slow
@needs_compiler
def test_every_kernel_of_a_cpu_is_right_and_broken_ones_are_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    experts, attention = decode.experts, decode.attention

    def off_by_a_thousandth(x_MD, experts_MX, weights_MX, parameters, *rest):
        y_MD = experts(x_MD, experts_MX, weights_MX, parameters, *rest)
        return y_MD * 1.001 if "down_blocks" in parameters else y_MD

    def does_not_compile(*arguments):
        raise RuntimeError("an error\nof the compiler")

    def not_a_number(*arguments):
        return attention(*arguments).at[0, 0, 0].set(jnp.nan)

    monkeypatch.setattr(decode, "experts", off_by_a_thousandth)
    monkeypatch.setattr(decode, "einsum", does_not_compile)
    monkeypatch.setattr(decode, "attention", not_a_number)
    assert not check_command.run(str(tmp_path / "found.json"))
    found = {r["kernel"]: r for r in json.loads((tmp_path / "found.json").read_text("utf-8"))["results"]}
    assert {name: r["status"] for name, r in found.items()} == {
        "decode_matmul": "failed",
        "decode_experts": "ok",
        "decode_mxfp4_experts": "wrong",
        "decode_attention": "wrong",
        "swiglu": "ok",
        "rope": "ok",
        "attention": "ok",
        "adamw": "ok",
        "grouped_matmul": "ok",
        "mxfp4_matmul": "ok",
        "mxfp4_unpack": "ok",
    }
    assert found["decode_experts"]["error"] < 5e-6 and found["decode_experts"]["plain_milliseconds"] > 0
    assert 0.0009 < found["decode_mxfp4_experts"]["error"] < 0.0011
    assert found["decode_attention"]["error"] is None and "error inf" in found["decode_attention"]["detail"]
    printed = capsys.readouterr().out
    assert "decode_matmul (float32): failed, an error of the compiler" in printed
    assert "decode_mxfp4_experts (float32): wrong, error 1.0e-03 exceeds 5.0e-05" in printed
    assert "GPTOSS_JAX_KERNELS=plain:decode_attention,decode_matmul,decode_mxfp4_experts" in printed
    assert "17 of 22 checks passed" in printed


def test_without_a_compiler_the_kernels_are_unavailable(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "is_available", lambda: False)
    assert check_command.run()
    printed = capsys.readouterr().out
    assert "grouped_matmul (float32): unavailable, no working C++ compiler" in printed
    assert "0 of 0 checks passed" in printed


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["gpu", "tpu"])
def test_the_kernels_of_accelerators(backend):
    """All are listed; one of each is run here, since every kernel has tests of its own."""
    cases = {(c.kernel, c.variant, c.dtype): c for c in check.cases(backend, interpret=True)}
    variants = ("few rows", "many rows") if backend == "gpu" else ("",)
    one_type = [("attention", name) for name in ("full", "sliding", "full at an offset")]
    one_type += [("grouped_matmul", "")]
    one_type += [("mxfp4_matmul", variant) for variant in variants]
    assert list(cases) == [(*case, dtype) for dtype in ("bfloat16", "float32") for case in one_type]
    run = [("attention", "sliding", "bfloat16"), ("grouped_matmul", "", "bfloat16")]
    found = [check_case(cases[c], backend, True) for c in [*run, ("mxfp4_matmul", variants[0], "float32")]]
    assert [r for r in found if r.status != "ok"] == []


def test_a_broken_kernel_of_an_accelerator(monkeypatch):
    def with_nibbles_exchanged(*arguments):
        return codec.kernel_values(*arguments)[::-1]

    broken = types.SimpleNamespace(**vars(codec) | {"kernel_values": with_nibbles_exchanged})
    monkeypatch.setattr(triton_mxfp4, "codec", broken)
    cases = [c for c in check.cases("gpu", True) if (c.kernel, c.variant) == ("mxfp4_matmul", "few rows")]
    assert [check_case(c, "gpu", True).status for c in cases] == ["wrong", "wrong"]


def case_of(kernel, run=jnp.sin, plain=jnp.sin):
    return Case(kernel, "", "float32", lambda: (jnp.ones(3),), run, plain)


def out_of_memory(x):
    raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")


@pytest.mark.parametrize("which", ["run", "plain"])
def test_a_full_memory_says_nothing_about_a_kernel(which):
    assert check_case(case_of("attention", **{which: out_of_memory}), "tpu").status == "unchecked"
    assert check_case(case_of("attention"), "tpu").status == "ok"


GPU_KERNELS = ["attention", "grouped_matmul", "mxfp4_matmul"]


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with a GPU that no check has seen. Its checks give what `statuses` says, or "ok"."""
    statuses, checked = {}, []

    def fake_check(case, backend):
        checked.append(case.kernel)
        # A program of its own, although another one may be traced.
        assert float(jax.jit(jnp.sum)(jnp.ones(3))) == 3
        status = statuses.get(case.kernel, "ok")
        if status is KeyboardInterrupt:
            raise status
        return Result(case.kernel, "", "bfloat16", status, "" if status == "ok" else "error 0.5")

    monkeypatch.setattr(check, "check_case", fake_check)
    monkeypatch.setattr(check, "cases", lambda backend: map(case_of, GPU_KERNELS))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(backend, "platform", lambda: "gpu")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(selection, "_failed_elsewhere", set())
    monkeypatch.delenv(selection.ENVIRONMENT, raising=False)
    selection._failed_here.cache_clear()
    record = selection.record_path("gpu")
    assert tmp_path in record.parents
    yield statuses, checked, record
    selection._failed_here.cache_clear()


def test_the_first_use_on_a_gpu_checks_and_remembers(machine, capsys):
    statuses, checked, record = machine
    statuses["grouped_matmul"] = "wrong"
    with pytest.warns(UserWarning, match="kernel grouped_matmul is off on this gpu.*wrong \\(error 0.5\\)"):
        # The first question comes while a program is traced.
        assert jax.jit(lambda x: x + selection.is_enabled("attention"))(0) == 1
    assert not selection.is_enabled("grouped_matmul")
    assert checked == GPU_KERNELS
    assert "2 of 3 checks passed" in capsys.readouterr().err
    # The next process reads the record, and warns again.
    selection._failed_here.cache_clear()
    with pytest.warns(UserWarning, match="kernel grouped_matmul is off"):
        assert not selection.is_enabled("grouped_matmul")
    assert checked == GPU_KERNELS and capsys.readouterr().err == ""
    # `gptoss check` looks again.
    statuses.clear()
    assert check_command.run()
    selection._failed_here.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert selection.is_enabled("grouped_matmul")


def test_what_turns_the_check_off(machine, monkeypatch):
    statuses, checked, _ = machine
    statuses.update(dict.fromkeys(GPU_KERNELS, "wrong"))
    for setting, enabled in (("unchecked", True), ("plain", False)):
        with selection.using(setting):
            assert selection.is_enabled("attention") is enabled
        monkeypatch.setenv(selection.ENVIRONMENT, setting)
        assert selection.is_enabled("attention") is enabled
        monkeypatch.delenv(selection.ENVIRONMENT)
    monkeypatch.setattr(backend, "platform", lambda: "tpu")  # compiled for other devices than those here
    assert selection.is_enabled("attention")
    monkeypatch.setattr(backend, "platform", lambda: "another")  # a plugin, for which there are no kernels
    assert not selection.is_enabled("attention")
    assert checked == []


def test_required_kernels_must_pass(machine, monkeypatch):
    statuses, _, _ = machine
    statuses["attention"] = "wrong"
    with pytest.warns(UserWarning, match="kernel attention is off"), selection.using("required"):
        message = "model.kernels is 'required': attention failed on this gpu; .*'plain:attention' uses"
        with pytest.raises(ValueError, match=message):
            selection.is_enabled("grouped_matmul")
        monkeypatch.setenv(selection.ENVIRONMENT, "plain:attention")
        assert selection.is_enabled("grouped_matmul") and not selection.is_enabled("attention")
    monkeypatch.setenv(selection.ENVIRONMENT, "required")
    with pytest.raises(ValueError, match="GPTOSS_JAX_KERNELS is 'required': attention failed"):
        selection.is_enabled("attention")


def test_a_kernel_that_ended_the_process_is_off(machine, capsys):
    _, checked, record = machine
    record.write_text(json.dumps({"kernels": {"attention": ""}, "running": "grouped_matmul"}), "utf-8")
    with pytest.warns(UserWarning, match="kernel grouped_matmul is off .*its check crashed the process"):
        assert not selection.is_enabled("grouped_matmul")
    assert checked == ["mxfp4_matmul"]
    # `gptoss check` names it, and gets past it.
    assert not check_command.run()
    assert checked == ["mxfp4_matmul", "attention", "mxfp4_matmul"]
    printed = capsys.readouterr().out
    assert f"its check crashed an earlier process; remove {record} to run it again" in printed
    assert "2 of 3 checks passed" in printed


def test_other_processes_wait_for_the_check(machine):
    """The lock tells a check that is running from one that has ended its process."""
    _, checked, record = machine
    record.write_text(json.dumps({"kernels": {"attention": ""}, "running": "grouped_matmul"}), "utf-8")
    found = []
    with selection._exclusive(record):
        waiting = threading.Thread(target=lambda: found.append(selection.is_enabled("grouped_matmul")))
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive() and checked == []
        done = {"kernels": dict.fromkeys(GPU_KERNELS, ""), "running": None}
        record.write_text(json.dumps(done), "utf-8")
    waiting.join(10)
    assert found == [True] and checked == []


def test_a_check_that_is_interrupted_blames_no_kernel(machine):
    statuses, checked, record = machine
    statuses["grouped_matmul"] = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        selection.is_enabled("attention")
    statuses["grouped_matmul"] = "unchecked"
    with pytest.warns(UserWarning, match="kernel grouped_matmul could not be checked: error 0.5"):
        assert selection.is_enabled("grouped_matmul")
    # It is in use, and the next process checks it, and only it.
    statuses.clear()
    selection._failed_here.cache_clear()
    assert selection.is_enabled("grouped_matmul")
    assert checked == ["attention", "grouped_matmul", "grouped_matmul", "mxfp4_matmul", "grouped_matmul"]


@pytest.mark.parametrize("content", ["", "[]", '{"kernels": {}}', '{"kernels": 3, "running": null}'])
def test_a_damaged_record_is_made_again(machine, content):
    _, checked, record = machine
    record.write_text(content, "utf-8")
    assert selection.is_enabled("attention")
    assert checked == GPU_KERNELS
    assert json.loads(record.read_text("utf-8"))["kernels"] == dict.fromkeys(GPU_KERNELS, "")


def test_a_kernel_that_breaks_the_device_ends_the_process_in_one_line(machine, monkeypatch, tmp_path):
    statuses, checked, record = machine
    statuses["attention"] = "failed"
    monkeypatch.setattr(selection, "_device_works", lambda: False)
    message = "kernel attention left the device unusable: .* Run the command again"
    with pytest.raises(OSError, match=message):
        check_command.run(str(tmp_path / "found.json"))
    (found,) = json.loads((tmp_path / "found.json").read_text("utf-8"))["results"]
    assert found["kernel"] == "attention" and found["status"] == "failed"
    # The next process starts where this one ended.
    monkeypatch.setattr(selection, "_device_works", lambda: True)
    with pytest.warns(UserWarning, match="kernel attention is off"):
        assert selection.is_enabled("mxfp4_matmul")
    assert checked == GPU_KERNELS and not selection.is_enabled("attention")


def test_a_kernel_that_failed_in_another_process_is_off_here(machine):
    assert selection.is_enabled("mxfp4_matmul")
    selection.turn_off(["mxfp4_matmul"])
    assert not selection.is_enabled("mxfp4_matmul") and selection.is_enabled("attention")


def test_processes_agree_on_kernels(machine, monkeypatch):
    others = [["auto", []], ["auto", ["mxfp4_matmul"]]]
    monkeypatch.setattr(distributed, "allgather_host", lambda mine: [list(mine), *others])
    distributed.agree_on_kernels.cache_clear()
    with pytest.warns(UserWarning, match="kernel mxfp4_matmul is off: it failed its check in process 2"):
        distributed.agree_on_kernels("auto")
    assert not selection.is_enabled("mxfp4_matmul") and selection.is_enabled("attention")
    others[0][0] = "plain"
    distributed.agree_on_kernels.cache_clear()
    message = "GPTOSS_JAX_KERNELS is 'plain': of process 1; process 0 has 'auto', and all processes must have"
    with pytest.raises(ValueError, match=message):
        distributed.agree_on_kernels("auto")
    distributed.agree_on_kernels.cache_clear()


@needs_compiler
def test_plain_compiles_no_kernel_into_a_model(tiny_config, random_params):
    def text(setting):
        config = dataclasses.replace(tiny_config, kernels=setting)
        forward = jax.jit(lambda params, tokens: bind(config, params)(tokens))
        return forward.lower(random_params(tiny_config), jnp.ones((1, 9), jnp.int32)).as_text()

    assert "gptoss_jax." in text("auto")
    assert "gptoss_jax." not in text("plain")
    some = text("plain:decode_matmul")
    assert "gptoss_jax.DecodeMatmul" not in some and "gptoss_jax.Grouped" in some


@needs_compiler
def test_plain_compiles_no_kernel_into_a_step(tiny_config):
    def texts(setting):
        model = dataclasses.replace(tiny_config, kernels=setting)
        config = TrainConfig(model=model, data=DataConfig(seq_len=32, batch_size=2), mesh=MeshConfig(data=1))
        mesh = make_mesh(config.mesh, jax.devices()[:1])
        rows = jnp.ones((2, 32), jnp.int32)
        batch = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), rows)
        with jax.set_mesh(mesh):
            params = create_params(config, mesh)
            state = create_state(config, mesh, params)
            train = make_train_step(config).lower(state, batch)
            return train.as_text() + make_eval_step(config.model).lower(params, batch).as_text()

    assert "gptoss_jax." in texts("auto")
    assert "gptoss_jax." not in texts("plain")


def test_plain_attention_on_a_gpu_is_the_blockwise_one(monkeypatch):
    monkeypatch.setattr(backend, "platform", lambda: "gpu")
    x = jnp.ones((1, 4, 2, 16))
    places = jnp.zeros((1, 4), jnp.int32)
    with selection.using("plain:attention"):
        text = jax.make_jaxpr(lambda x: attention(x, x, x, places, places, AttentionSpec()))(x)
    assert "pallas_call" not in str(text)
    with selection.using("plain:grouped_matmul"):
        assert api._implementation() is api.xla_grouped_matmul


def test_the_gradient_of_a_group_bias_adds_up_in_float32():
    """257 rows of ones: in bfloat16, 256 + 1 is 256."""
    x_RF, bias_EF = jnp.zeros((257, 2), jnp.bfloat16), jnp.zeros((1, 2), jnp.bfloat16)

    def total(bias_EF):
        y_RF = api.add_group_bias(x_RF, bias_EF, jnp.array([257]))
        return jnp.sum(y_RF.astype(jnp.float32))

    scale = 1.015625  # 260 / 256, so that the right sum is a bfloat16
    np.testing.assert_array_equal(jax.grad(lambda b: scale * total(b))(bias_EF), [[262, 262]])

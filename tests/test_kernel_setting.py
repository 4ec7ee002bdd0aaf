"""The setting that turns kernels off: `model.kernels` and GPTOSS_JAX_KERNELS."""

import os
import subprocess
import sys

import pytest

from gptoss_jax.config import ModelConfig
from gptoss_jax.config.kernels import KERNELS, plain_kernels
from gptoss_jax.kernels import selection


@pytest.mark.parametrize(
    ("setting", "off"),
    [
        ("auto", set()),
        ("required", set()),
        ("unchecked", set()),
        ("plain", set(KERNELS)),
        ("plain:attention", {"attention"}),
        ("plain:attention,mxfp4_matmul", {"attention", "mxfp4_matmul"}),
    ],
)
def test_settings(setting, off):
    assert plain_kernels(setting, "model.kernels") == off
    assert ModelConfig(kernels=setting).kernels == setting


@pytest.mark.parametrize("setting", ["", "plane", "plain:", "plain:attn", "auto:attention", "attention"])
def test_a_setting_that_means_nothing_is_refused(setting):
    with pytest.raises(
        ValueError, match=f"model.kernels is '{setting}': must be auto, required, unchecked, plain, or"
    ):
        ModelConfig(kernels=setting)


def test_the_former_variable_is_refused(monkeypatch):
    monkeypatch.setenv("GPTOSS_JAX_NATIVE", "0")
    with pytest.raises(ValueError, match="GPTOSS_JAX_NATIVE is '0': was renamed; set GPTOSS_JAX_KERNELS"):
        selection.is_enabled("grouped_matmul")


def test_the_command_refuses_a_bad_variable_at_once():
    environment = os.environ | {"GPTOSS_JAX_KERNELS": "plane"}
    done = subprocess.run(
        [sys.executable, "-m", "gptoss_jax", "check"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 2 and done.stdout == ""
    assert "GPTOSS_JAX_KERNELS is 'plane': must be auto, required, unchecked, plain, or plain:" in done.stderr

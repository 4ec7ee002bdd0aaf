"""Before JAX is loaded: libtpu on a machine without a TPU, and caches without a home folder."""

import importlib.machinery
import os
import pathlib
import re
import shutil
import stat
import subprocess
import sys

import pytest
from helpers.xla_flags import FAST_COMPILE

from gptoss_jax import startup
from gptoss_jax.config import paths
from gptoss_jax.kernels.cpu import build

ROOT = pathlib.Path(__file__).parents[1]
PRIVATE = f"gptoss_jax-{os.getuid()}"


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """An empty folder for temporary files, for a process that cannot write to its home folder."""
    monkeypatch.setattr(paths.tempfile, "tempdir", str(tmp_path))
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/dev/null/home")
    paths.private_folder.cache_clear()
    yield tmp_path
    paths.private_folder.cache_clear()


def test_caches_fall_back_to_a_private_folder(temporary):
    folder = paths.cache_folder("native")
    assert folder == temporary / PRIVATE / "native" and folder.is_dir()
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    paths.private_folder.cache_clear()
    assert paths.cache_folder("native") == folder


def test_a_writable_home_folder_comes_first(temporary, monkeypatch):
    monkeypatch.setenv("HOME", str(temporary / "home"))
    assert paths.cache_folder("native") == temporary / "home" / ".cache" / "gptoss_jax" / "native"
    monkeypatch.setenv("XDG_CACHE_HOME", "~/other")
    assert paths.cache_folder("native") == temporary / "home" / "other" / "gptoss_jax" / "native"
    assert not (temporary / PRIVATE).exists()


def test_unknown_home_folder(temporary, monkeypatch):
    monkeypatch.delenv("HOME")
    # As for a user id without an account.
    monkeypatch.setattr("os.path.expanduser", lambda text: text)
    assert paths.cache_folder("native") == temporary / PRIVATE / "native"


@pytest.mark.parametrize("plant", ["writable", "link", "file"])
def test_a_folder_planted_by_another_user_is_not_used(temporary, plant):
    planted = temporary / PRIVATE
    if plant == "link":
        (temporary / "other").mkdir(mode=0o700)
        planted.symlink_to(temporary / "other")
    elif plant == "file":
        planted.touch()
    else:
        planted.mkdir()
        planted.chmod(0o777)
    folder = paths.private_folder()
    assert folder != planted and folder.parent == temporary
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_folder_of_another_user_is_not_used(temporary, monkeypatch):
    uid = os.getuid() + 1
    (temporary / f"gptoss_jax-{uid}").mkdir(mode=0o700)
    monkeypatch.setattr("os.getuid", lambda: uid)
    assert paths.private_folder().name.startswith("gptoss_jax-")
    assert paths.private_folder().name != f"gptoss_jax-{uid}"


def test_matplotlib_keeps_its_folder_if_writable(temporary, monkeypatch):
    monkeypatch.setenv("HOME", str(temporary / "home"))
    paths.set_matplotlib_folder()
    assert "MPLCONFIGDIR" not in os.environ
    monkeypatch.setenv("HOME", "/dev/null/home")
    paths.set_matplotlib_folder()
    assert os.environ["MPLCONFIGDIR"] == str(temporary / PRIVATE / "matplotlib")
    monkeypatch.setenv("MPLCONFIGDIR", "/mine")
    paths.set_matplotlib_folder()
    assert os.environ["MPLCONFIGDIR"] == "/mine"


@pytest.fixture
def no_tpu(monkeypatch):
    """A machine without signs of a TPU, before JAX is loaded; returns its device files."""
    files: list[str] = []
    matching = startup.glob.fnmatch.filter
    monkeypatch.setattr(startup.glob, "glob", lambda pattern: matching(files, pattern))
    for name in [*os.environ]:
        if name.startswith(startup.TPU_VARIABLES) or name in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME"):
            monkeypatch.delenv(name)
    for name in ("jax", "libtpu"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return files


def is_hidden() -> bool:
    startup.hide_tpu_compiler()
    return "libtpu" in sys.modules and sys.modules["libtpu"] is None


@pytest.mark.parametrize("files", [[], ["/dev/nvidia0", "/dev/vfio/vfio"]])
def test_libtpu_is_hidden_without_a_tpu(no_tpu, files, monkeypatch):
    no_tpu += files
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    package = importlib.machinery.PathFinder.find_spec("libtpu")
    if package is not None:
        monkeypatch.setenv("TPU_LIBRARY_PATH", str(pathlib.Path(package.origin).with_name("libtpu.so")))
    assert is_hidden()
    assert "TPU_LIBRARY_PATH" not in os.environ
    with pytest.raises(ModuleNotFoundError):
        import libtpu  # noqa: F401


@pytest.mark.parametrize("file", ["/dev/accel0", "/dev/vfio/0", "/dev/vfio/12"])
def test_libtpu_is_used_with_a_tpu(no_tpu, file):
    no_tpu.append(file)
    assert not is_hidden()


@pytest.mark.parametrize("name", ["TPU_WORKER_HOSTNAMES", "TPU_LIBRARY_PATH", "JAX_PLATFORMS"])
def test_libtpu_is_used_if_the_environment_says_so(no_tpu, name, monkeypatch):
    monkeypatch.setenv(name, "tpu")
    assert not is_hidden()


@pytest.mark.parametrize(
    ("vendor", "kind", "found"),
    [
        ("0x1ae0", "0x120000", True),
        ("0x1ae0", "0x020000", False),  # the network card of Google's virtual machines
        ("0x1ae0", "0x010802", False),  # their disks
        ("0x10de", "0x030200", False),
    ],
)
def test_tpu_chips_are_found_on_the_pci_bus(tmp_path, vendor, kind, found):
    (tmp_path / "vendor").write_text(vendor + "\n")
    (tmp_path / "class").write_text(kind + "\n")
    assert startup._is_tpu(str(tmp_path)) == found
    assert not startup._is_tpu(str(tmp_path / "none"))


@pytest.mark.skipif(startup.may_have_tpu(), reason="libtpu is loaded on a machine with a TPU")
def test_commands_print_nothing_to_stderr(tmp_path):
    """Without a usable home folder and JAX_PLATFORMS, and a libtpu and a torch that print when loaded."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "libtpu.py").write_text(LIBTPU)
    # TensorBoard's writer would load it.
    (tmp_path / "packages" / "torch.py").write_text('import sys\nprint("torch", file=sys.stderr)\n')
    removed = {"JAX_PLATFORMS", "JAX_PLATFORM_NAME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR"}
    # These could name the libtpu installed here.
    removed |= {name for name in os.environ if name.startswith(startup.TPU_VARIABLES)}
    environment = {name: value for name, value in os.environ.items() if name not in removed}
    environment |= {
        "HOME": "/dev/null/home", "TMPDIR": str(tmp_path), "PYTHONPATH": f"{tmp_path}/packages:{ROOT}",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=1 {FAST_COMPILE}",
    }  # fmt: skip
    if build.is_available():
        # Found, because compiling it would take seconds.
        compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))))
        (tmp_path / PRIVATE).mkdir(mode=0o700)
        shutil.copytree(build._compile(compiler).parent, tmp_path / PRIVATE / "native")
    (tmp_path / "preset.py").write_text(PRESET.format(folder=str(tmp_path)))
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text(f"story {number} of a fox " * 60)
    for command in (
        [ROOT / "train.py", tmp_path / "preset.py"],
        ["-m", "gptoss_jax", "convert", tmp_path / "run", tmp_path / "published"],
    ):
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
        # Slow work is announced.
        unexpected = re.sub(r"(?m)^(starting|opening) .*· \d:\d\d\n", "", done.stderr)
        assert (done.returncode, unexpected) == (0, "")
    assert (tmp_path / "run" / "report.png").is_file()
    assert (tmp_path / PRIVATE / "matplotlib").is_dir()


LIBTPU = """
import sys
print("libtpu was loaded", file=sys.stderr)
def get_library_path():
    return None
"""

PRESET = """
from gptoss_jax.config import *
config = TrainConfig(
    model=ModelConfig(
        vocab_size=257, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2, rope_scaling=None,
    ),
    data=DataConfig(
        source="text:{folder}/*.txt", tokenizer="bytes", seq_len=32, batch_size=2, val_fraction=0.3,
        cache_dir="{folder}/cache",
    ),
    eval=EvalConfig(batches=1, sample_tokens=0),
    optim=OptimConfig(warmup_steps=0),
    steps=1,
    run_dir="{folder}/run",
)
"""


def test_ctrl_c_ends_the_process_while_threads_run():
    """The interpreter's own shutdown would wait for the thread."""
    program = """
import sys, threading, time
from gptoss_jax import startup

def command():
    threading.Thread(target=time.sleep, args=(60,)).start()
    print("begun")
    raise KeyboardInterrupt

startup.leave(startup.run(command, "name"))
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "begun\n", "name: interrupted\n")


def test_a_process_that_cannot_restart_goes_on(monkeypatch):
    def refuse(*_):
        raise PermissionError("no")

    monkeypatch.setattr(os, "execv", refuse)
    monkeypatch.setenv("GLIBC_TUNABLES", "")  # restored afterwards
    startup.keep_memory()
    assert "glibc.malloc" in os.environ["GLIBC_TUNABLES"] or not sys.platform.startswith("linux")

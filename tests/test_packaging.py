"""What an installed copy has: presets by name, and one version. Facts that several files state."""

import ast
import pathlib
import re
import tomllib

import conftest
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import gptoss_jax
from gptoss_jax.cli import main
from gptoss_jax.config import TrainConfig, preset
from gptoss_jax.config.preset import find_preset, preset_names, read_preset

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PRESETS = sorted((ROOT / "configs").rglob("*.py"))


def test_names_of_the_presets():
    assert preset_names() == [
        "gpt_oss_120b",
        "gpt_oss_20b",
        "gpt_oss_2b",
        "quickstart",
        "tinystories",
        "dpo_qlora_20b",
        "grpo_qlora_20b",
        "qat_full_20b",
        "quickstart_dpo",
        "quickstart_grpo",
        "quickstart_qat",
        "quickstart_sft",
        "sft_full_20b",
        "sft_lora_20b",
        "sft_qlora_120b",
        "sft_qlora_20b",
    ]


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_are_found_from_any_folder(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    in_repository = path.relative_to(ROOT).as_posix()
    names = (path.stem, path.stem.replace("_", "-"), f"{path.stem}.py", in_repository)
    for name in (*names, in_repository.removeprefix("configs/"), f"./{in_repository}"):
        assert find_preset(name) == path, name
    assert read_preset(path.stem) == read_preset(path)


def test_the_page_has_the_reasons_for_skipping_rows():
    files = (ROOT / "gptoss_jax" / "data").glob("chat*.py")
    reasons = {reason for file in files for reason in re.findall(r'RowError\(\s*"(.+?)"', file.read_text())}
    table = (ROOT / "docs" / "fine-tuning.md").read_text().partition("| reason |")[2].partition("\n\n")[0]
    cells = [line.split("|")[1] for line in table.splitlines()[2:]]
    assert len(reasons) > 15 and {name for cell in cells for name in re.findall("`(.+?)`", cell)} == reasons


def test_a_run_folder_is_no_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("mine").mkdir()
    TrainConfig().save("mine/config.json")
    with pytest.raises(ValueError, match=r"^config is 'mine': a run folder.*repeat the command"):
        find_preset("mine")


@pytest.mark.parametrize(
    "name", ["gpt_oss_20", "configs/sft_lora_20b.py", "finetune/quickstart.py", "/configs/quickstart.py"]
)
def test_other_names_are_rejected_with_a_suggestion(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as caught:
        find_preset(name)
    start, _, end = str(caught.value).partition("; the presets are ")
    assert " (did you mean " in start
    assert start.partition(" (did you mean ")[0] == f"config is '{name}': no such file or preset"
    assert end.startswith("gpt_oss_120b, gpt_oss_20b, gpt_oss_2b, quick")


def test_a_file_comes_before_a_preset_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt_oss_20b").mkdir()  # a folder of weights
    assert find_preset("gpt_oss_20b").parent == ROOT / "configs"
    (tmp_path / "quickstart.py").touch()
    assert find_preset("quickstart.py") == pathlib.Path("quickstart.py")
    assert find_preset("quickstart").parent == ROOT / "configs"


def test_presets_of_an_installed_package(tmp_path, monkeypatch):
    """A wheel has them in the package, where `configs/` of a checkout would not be found."""
    package = tmp_path / "site-packages" / "gptoss_jax"
    mine = package / "configs" / "finetune" / "mine.py"
    mine.parent.mkdir(parents=True)
    mine.touch()
    monkeypatch.setattr(preset, "__file__", str(package / "config" / "preset.py"))
    assert preset_names() == ["mine"]
    assert find_preset("mine") == find_preset("configs/finetune/mine.py") == mine


def test_version(capsys):
    assert main.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith(f"gptoss-jax {gptoss_jax.__version__}, jax ")


def test_the_version_is_the_same_everywhere():
    assert PROJECT["project"]["dynamic"] == ["version", "readme"]
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "gptoss_jax/version.py"
    released = re.findall(r"^## \[(\d.*)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert released[0] == gptoss_jax.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == gptoss_jax.__version__


def test_ci_tests_every_supported_python_with_pinned_versions():
    prefix = "Programming Language :: Python :: 3."
    supported = [line.split()[-1] for line in PROJECT["project"]["classifiers"] if line.startswith(prefix)]
    assert PROJECT["project"]["requires-python"] == f">={supported[0]}"
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    matrix = workflow["jobs"]["tests"]["strategy"]["matrix"]["include"]
    assert [entry["python"] for entry in matrix] == supported
    assert {entry["versions"] for entry in matrix} == {"lowest", "latest"}


@pytest.mark.parametrize("name", ["lowest", "latest"])
def test_constraints_pin_every_dependency(name):
    """`.ci/update_constraints` has to run again after a change in pyproject.toml."""
    lines = (ROOT / "constraints" / f"{name}.txt").read_text().splitlines()
    pins = dict(line.partition(" ")[0].split("==") for line in lines if not line.startswith(("#", " ")))
    project = PROJECT["project"]
    unpinned = {"cuda", "tpu"}  # the versions of their packages follow jax
    extras = [needs for extra, needs in project["optional-dependencies"].items() if extra not in unpinned]
    for need in sum(extras, project["dependencies"]):
        requirement = Requirement(need)
        if requirement.name != "gptoss-jax":
            assert pins[canonicalize_name(requirement.name)] in requirement.specifier, need


def test_every_benchmark_is_described():
    described = re.findall(r"`(\w+\.py)`", (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8"))
    scripts = {path.name for path in (ROOT / "benchmarks").glob("*.py") if not path.name.startswith("gpu_")}
    assert set(described) == scripts


def top_imports(path):
    """The packages that a module imports when it is imported itself."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.partition(".")[0]


def test_files_that_need_all_test_packages_are_listed():
    packages = {package for packages in conftest.TEST_ALL.values() for package in packages}
    paths = sorted(pathlib.Path(__file__).parent.glob("test_*.py"))
    found = {path.name: packages & {*top_imports(path)} for path in paths}
    missing = {name: needs - {*conftest.TEST_ALL.get(name, ())} for name, needs in found.items()}
    assert {name: needs for name, needs in missing.items() if needs} == {}
    assert conftest.TEST_ALL.keys() <= found.keys()

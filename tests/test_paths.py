"""Paths given by users."""

import os
import pathlib
import re

import pytest

from gptoss_jax.config.paths import output_file, replace_file, user_path


@pytest.mark.parametrize(
    ("given", "expanded"),
    [
        ("~/runs/x", "/home/ada/runs/x"),
        ("~", "/home/ada"),
        ("runs/~x", "runs/~x"),
        ("./~x", f"{os.getcwd()}/~x"),
        ("/a b/[c]", "/a b/[c]"),
        (pathlib.Path("~/é\n"), "/home/ada/é\n"),
    ],
)
def test_only_a_leading_home_folder_is_expanded(given, expanded, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    found = user_path(given, "run_dir")
    assert found == pathlib.Path(expanded)
    assert user_path(found, "run_dir") == found


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("~nobody-here/x", "run_dir is '~nobody-here/x': there is no user 'nobody-here'"),
        ("", "run_dir is '': must not be empty"),
        ("a\0b", "must not contain a null character"),
    ],
)
def test_invalid_paths_are_rejected(given, message):
    with pytest.raises(ValueError) as error:
        user_path(given, "run_dir")
    assert message in str(error.value)


def test_a_process_without_a_home_folder(monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    # As for a user id without an account.
    monkeypatch.setattr("os.path.expanduser", lambda text: text)
    with pytest.raises(ValueError, match="data.cache_dir is '~/.cache': the home folder is unknown"):
        user_path("~/.cache", "data.cache_dir")


ROOT = pathlib.Path(__file__).parents[1]


def test_no_other_module_expands_the_home_folder():
    expanding = [
        str(path.relative_to(ROOT))
        for folder in ("gptoss_jax", "benchmarks", "configs")
        for path in (*(ROOT / folder).rglob("*.py"), ROOT / "train.py")
        if re.search(r"expanduser|Path\.home|environ.*HOME\b", path.read_text("utf-8"))
    ]
    assert set(expanding) == {"gptoss_jax/config/paths.py"}


def test_output_files_are_checked_first(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert output_file("~/x.json", "json") == tmp_path / "x.json"
    with pytest.raises(ValueError, match="json is '~/none/x.json': its folder does not exist"):
        output_file("~/none/x.json", "json")
    with pytest.raises(ValueError, match="json is '~': is a folder; name a file"):
        output_file("~", "json")
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    with pytest.raises(ValueError, match=r"json is '~/x.json': cannot be written \(permission denied\)"):
        output_file("~/x.json", "json")


def test_a_file_is_replaced_when_it_is_complete(tmp_path):
    path, link = tmp_path / "x.json", tmp_path / "link"
    path.write_text("old")
    link.symlink_to(path)
    for error in (KeyError, OSError(28, "No space left on device")):
        with pytest.raises((KeyError, ValueError)), replace_file(path, "--json") as file:
            file.write("new")
            raise error
        assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 2
    with replace_file(link, "--json") as file:
        file.write("é")
    assert path.read_text("utf-8") == "é" and link.is_symlink() and len(list(tmp_path.iterdir())) == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a device that is always full")
def test_a_full_disk():
    message = r"--json is '/dev/full': cannot be written \(No space left on device\)"
    with pytest.raises(ValueError, match=message), replace_file("/dev/full", "--json") as file:
        file.write("x")
    assert os.path.exists("/dev/full")

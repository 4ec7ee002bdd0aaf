"""Paths as users write them."""

import pathlib

import pytest

from gptoss_jax.config.paths import user_path


@pytest.mark.parametrize(
    ("given", "expanded"),
    [
        ("~/runs/x", "/home/ada/runs/x"),
        ("~", "/home/ada"),
        ("runs/~x", "runs/~x"),
        ("./~x", "~x"),
        ("/a b/[c]", "/a b/[c]"),
        (pathlib.Path("~/é\n"), "/home/ada/é\n"),
    ],
)
def test_the_home_folder_is_expanded_at_the_start_only(given, expanded, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    assert user_path(given, "run_dir") == pathlib.Path(expanded)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("~nobody-here/x", "run_dir is '~nobody-here/x': there is no user 'nobody-here'"),
        ("", "run_dir is '': must not be empty"),
        ("a\0b", "must not contain a null character"),
    ],
)
def test_a_path_without_a_meaning_is_refused_by_name(given, message):
    with pytest.raises(ValueError) as error:
        user_path(given, "run_dir")
    assert message in str(error.value)


def test_a_process_without_a_home_folder(monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    # What it does for a user id that has no account.
    monkeypatch.setattr("os.path.expanduser", lambda text: text)
    with pytest.raises(ValueError, match="data.cache_dir is '~/.cache': the home folder is not known"):
        user_path("~/.cache", "data.cache_dir")

from __future__ import annotations

import inspect

import pytest

from gumbel_plugin import errors
from gumbel_plugin.errors import GumbelPluginError, MissingExtraError, nearest


def test_every_error_is_the_projects_and_a_builtin_one() -> None:
    classes = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, Exception)]
    assert len(classes) > 5
    for error in classes:
        assert issubclass(error, GumbelPluginError)
        if error is not GumbelPluginError:
            assert issubclass(error, (ValueError, RuntimeError, ImportError)), error
        assert error.__doc__


def test_a_missing_extra_says_how_to_install_it() -> None:
    with pytest.raises(
        ImportError, match=r"^nni is not installed; install it with: pip install 'gumbel-plugin\[nni\]'$"
    ):
        raise MissingExtraError("nni", "nni")


@pytest.mark.parametrize(
    ("name", "choices", "hint"),
    [
        ("conv_1", ["fc", "conv1", "conv2"], "; did you mean 'conv1'?"),
        ("xyz", ["fc", "conv1"], "; valid: conv1, fc"),
        ("xyz", [f"layer{n}" for n in range(9)], "; valid: " + ", ".join(f"layer{n}" for n in range(8)) + ", ..."),
        ("xyz", [], "; there is none"),
    ],
)
def test_the_hint_names_what_is_near_or_what_there_is(name: str, choices: list[str], hint: str) -> None:
    assert nearest(name, choices) == hint

from __future__ import annotations

import inspect

import pytest

from gumbel_plugin import errors
from gumbel_plugin.errors import ConfigError, GumbelPluginError, MissingExtraError, nearest, shown


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


def _nested(levels: int) -> list[object]:
    value: list[object] = ["x"] * 10
    for _ in range(levels):
        value = [value] * 10  # what YAML aliases make of a kilobyte: 10 ** levels strings
    return value


class _NoRepr:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


_ITSELF: list[object] = []
_ITSELF.append(_ITSELF)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("conv1", "'conv1'"),
        (0.5, "0.5"),
        (["a", 1], "['a', 1]"),
        ({"a": {"b": 1}}, "{'a': {'b': 1}}"),
        (10**5000, "an integer of 16610 bits"),
        (_ITSELF, "[[[[...]]]]"),
    ],
    ids=["string", "number", "list", "mapping", "digits", "recursive"],
)
def test_a_value_is_shown_as_it_was_typed_whatever_it_is(value: object, text: str) -> None:
    assert shown(value) == text


def test_a_value_whose_repr_fails_is_shown_all_the_same() -> None:
    assert "_NoRepr" in shown(_NoRepr())


@pytest.mark.parametrize(
    "value",
    ["x" * 10**6, _nested(8), dict.fromkeys(range(10**5), "y" * 99), b"z" * 10**6],
    ids=["string", "aliases", "mapping", "bytes"],
)
def test_what_is_shown_of_a_value_is_bounded(value: object) -> None:
    assert len(shown(value)) <= 160
    assert " ... " in shown(value) or "..." in shown(value)


def test_no_message_is_longer_than_a_screen() -> None:
    message = str(ConfigError("begin " + "x" * 10**6 + " end"))
    assert len(message) <= 2000
    assert message.startswith("begin")
    assert message.endswith("end")

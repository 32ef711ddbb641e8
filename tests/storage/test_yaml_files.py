from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from gumbel_plugin.config_values import MAX_DEPTH
from gumbel_plugin.errors import ConfigError
from gumbel_plugin.storage.yaml_files import MAX_BYTES, parse_yaml, read_yaml, write_yaml

BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)
)
MERGE_BOMB = "a0: &a0 {k: 1}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{','.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 30)
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: &x [1, 2]\nb: *x", {"a": [1, 2], "b": [1, 2]}),
        ("a: &x {k: 1, l: 2}\nb: {<<: *x, k: 3}", {"a": {"k": 1, "l": 2}, "b": {"k": 3, "l": 2}}),
        ("a: {<<: [&x {k: 1}, {k: 2, l: 2}]}\nb: *x", {"a": {"k": 1, "l": 2}, "b": {"k": 1}}),
        ("a: {k: 1}\nb: {k: 2}", {"a": {"k": 1}, "b": {"k": 2}}),
        ("a: 1e-3\nb: -1E5\nc: '1e-3'\nd: 1.5e+3", {"a": 0.001, "b": -1e5, "c": "1e-3", "d": 1500.0}),
        ("\ufeff# größer\na: ü", {"a": "ü"}),
        (MERGE_BOMB, {f"a{n}": {"k": 1} for n in range(30)}),
    ],
)  # fmt: skip
def test_ordinary_yaml_is_read(text: str, expected: Any, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    assert read_yaml(path) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 0\nmodel: x\nseed: 7", "line 3: the key 'seed' is given twice, first in line 1"),
        ("a:\n  k: 1\n  l: 2\n  k: 1", "line 4: the key 'k' is given twice, first in line 2"),
        ("a: [{k: 1, 'k': 1}]", "line 1: the key 'k' is given twice"),
        ("a: &x {k: 1}\nb: {<<: *x, <<: *x}", "line 2: the key '<<' is given twice"),
        ("a: &o {x: *o}", "line 1: .* contain itself"),
        ("a: &o [*o]", "line 1: .* contain itself"),
        ("a: &o {<<: *o}", "line 1: .* contain itself"),
        (BOMB, "more than 20,000 values"),
        ("- a\n" * 50_000, "line .*more than 20,000 values"),
        (f"a:\n  b: {'[' * 2000}", f"line 2: nested too deeply: more than {MAX_DEPTH} levels"),
        ("{a: " * 2000, "line 1: nested too deeply"),
        ("- " * 2000, "line 1: nested too deeply"),
        ("a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 60)), "nested too deeply"),
        ("a: 1\nb: !!bool maybe", "line 2: 'maybe' is no valid bool"),
        ("a: !!bool [1]", "line 1: the tag 'bool' does not belong here"),
        ("a: !!int abc", "line 1: 'abc' is no valid int"),
        ("a: !!float x", "line 1: 'x' is no valid float"),
        ("a: !!map x", "line 1: 'x' reads as 'map'"),
        ("a: 0x_", "line 1: '0x_' is no valid int"),
        (f"a: {'9' * 5000}", "line 1: '9999.*' is no valid int"),
        (f"a: 0x{'9' * 5000}", "a = an integer of 20000 bits: .*less than"),
        ("a: !!python/object/apply:os.system [ls]", "line 1: the tag 'python/object/apply:os.system'"),
        ("a: !!python/name:os.system", "line 1: '' reads as 'python/name:os.system'"),
        ("a: !!binary YWJj", "reads as 'binary'"),
        ("a: !!set {x}", "the tag 'set'"),
        ("a: 2020-01-01", "'2020-01-01' reads as 'timestamp'; if it is text, put it in quotes"),
        ("a: 2020-13-45", "reads as 'timestamp'"),
        ("a: =", "'=' reads as 'value'"),
        ("a: {<<: 3}", "<< takes over a mapping"),
        ("a: .nan", "a = nan: a number must be finite"),
        ("a: {b: [1, -.inf]}", r"a\.b\.1 = -inf: a number must be finite"),
        ("a: {1: x}", "a: the key 1 is no text"),
        ("yes: x", "the key True is no text; put it in quotes"),
        ("? [a]\n: b", "line 1: a key must be text"),
        ('a: "\\0"', "a = '.x00': text holds no NUL"),
        ('a: "\\ud800"', "no surrogates"),
        ("a: \x01", "no valid YAML: unacceptable character"),
        ("a: *nothing", "no valid YAML: found undefined alias 'nothing'.*line 1"),
        ("a: 1\n---\nb: 1", "no valid YAML: expected a single document"),
        ("a: [1\nb: 2", "no valid YAML: .*line 2"),
    ],
)
def test_damaged_yaml_is_an_error_of_one_short_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as error:
        read_yaml(path)
    assert str(error.value).startswith("config ")
    assert len(str(error.value)) < 1000
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("a" * 5000, "File name too long|does not exist"),
        ("a\0b", "cannot be read: .*null|does not exist"),
        ("/dev/zero", "is no regular file"),
        ("/", "is no regular file"),
        ("", "is no regular file"),
        ("~a-user-that-nobody-is/run.yaml", "home directory"),
    ],
)
def test_what_is_no_file_is_an_error(path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        read_yaml(Path(path))
    assert len(str(error.value)) < 500


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(ConfigError, match="is no regular file"):
        read_yaml(tmp_path / "pipe.yaml")


def test_a_huge_file_is_an_error(tmp_path: Path) -> None:
    with (tmp_path / "huge.yaml").open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(ConfigError, match=f"larger than {MAX_BYTES:,} bytes"):
        read_yaml(tmp_path / "huge.yaml")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "latin-1"])
def test_other_encodings_are_an_error(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes("a: größer".encode(encoding))
    with pytest.raises(ConfigError, match="save it as UTF-8"):
        read_yaml(tmp_path / "run.yaml")


def test_the_home_folder_may_be_abbreviated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("a: 1")
    assert read_yaml(Path("~/run.yaml")) == {"a": 1}


@pytest.mark.parametrize(
    "text", ["1e-3", "1e5", "yes", "null", "1", "1.0", "2020-01-01", "=", "<<", "\x01", "\u2028", ""]
)
def test_text_is_written_so_that_it_stays_text(text: str) -> None:
    values = {"a": text, "b": [text, text], text: {"c": text}}
    assert parse_yaml(write_yaml(values)) == values

import json
import os

import pytest

from offline_quantize.checkpoint.atomic_files import (
    partial,
    publish,
    read_json,
    write_bytes,
    write_json,
)
from precalib_kernels.errors import FormatError


def test_a_file_is_written_beside_and_renamed(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file"
    seen = []
    monkeypatch.setattr(
        "offline_quantize.checkpoint.atomic_files.publish", lambda path: seen.append(path)
    )
    write_bytes(path, b"data")
    assert seen == [path]
    assert not path.exists()
    assert partial(path).read_bytes() == b"data"
    publish(path)
    assert path.read_bytes() == b"data"
    assert not partial(path).exists()


@pytest.mark.parametrize("value", [{"λ": "é\ud800", "n": [1, 2.5, None]}, {}])
def test_json_comes_back(tmp_path, value):
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json", FormatError, "") == value
    assert (tmp_path / "x.json").read_bytes().endswith(b"\n")


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "not valid JSON .*; do this"),
        (b"{", "not valid JSON .*; do this"),
        (b'{"a": "\xff"}', "not valid JSON .*; do this"),
        (b"[" * 100_000, "not valid JSON .*; do this"),
        (b"[1]", "not a JSON object; do this"),
        (json.dumps("text").encode(), "not a JSON object; do this"),
    ],
)
def test_damaged_json_is_one_sentence(tmp_path, data, text):
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(FormatError, match=rf"^{tmp_path}/x\.json: {text}$"):
        read_json(tmp_path / "x.json", FormatError, "do this")


def test_unreadable_json_is_one_sentence(tmp_path):
    with pytest.raises(FormatError, match=r"missing: the file is missing; do this"):
        read_json(tmp_path / "missing", FormatError, "do this")
    with pytest.raises(FormatError, match=r"not a file; do this"):
        read_json(tmp_path, FormatError, "do this")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "a": 2}', r"not valid JSON \(key 'a' stands twice with different values\)"),
        ('{"b": {"a": [], "a": {}}}', "key 'a' stands twice"),
        ("[" * 101 + "]" * 101, "nested more than 100 deep"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "not a JSON object"),
        (b"\xff\xfe", "not valid JSON"),
    ],
)
def test_ambiguous_and_deep_json_is_refused(tmp_path, text, said):
    path = tmp_path / "x.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(FormatError, match=rf"x\.json: .*{said}.*; do this"):
        read_json(path, FormatError, "do this")


def test_a_key_twice_with_one_value_is_read(tmp_path):
    (tmp_path / "x").write_text('{"a": [1], "a": [1], "b": ' + "[" * 99 + "]" * 99 + "}")
    assert read_json(tmp_path / "x", FormatError, "")["a"] == [1]


def test_json_past_any_use_is_not_read(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b"{")
    os.truncate(path, 1 << 40)
    with pytest.raises(FormatError, match=r"1,099,511,627,776 bytes are too many"):
        read_json(path, FormatError, "")

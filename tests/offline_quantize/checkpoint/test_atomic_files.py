import json

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

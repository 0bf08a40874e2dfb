import contextlib
import os
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from offline_quantize.checkpoint.safetensors_file import (
    NAMES,
    lay_out,
    read_header,
    read_pieces,
    read_tensor,
    tensor_bytes,
    write_at,
)
from precalib_kernels.errors import SourceError

SHAPES = [(), (0,), (3,), (2, 5), (0, 7), (4, 1, 3)]


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        f"é.{name}.{len(shape)}.{sum(shape)}": torch.randint(
            0, 2, shape, generator=generator, dtype=torch.uint8
        ).to(dtype)
        for dtype, name in NAMES.items()
        for shape in SHAPES
    }


def test_written_files_are_read_by_the_library_and_back(tmp_path, tensors):
    path = tmp_path / "x.safetensors"
    sizes = {n: (NAMES[t.dtype], tuple(t.shape), t.nbytes) for n, t in tensors.items()}
    layout = lay_out(sizes, {"format": "pt"})
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    names = list(tensors)
    random.Random(0).shuffle(names)
    for name in names:
        write_at(descriptor, tensor_bytes(tensors[name]), layout.entries[name].begin)
    write_at(descriptor, layout.header, 0)
    os.close(descriptor)

    assert path.stat().st_size == layout.size
    loaded = load_file(path)
    entries, metadata = read_header(path)
    assert metadata == {"format": "pt"}
    assert loaded.keys() == entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor)
        assert entries[name] == layout.entries[name]
        assert torch.equal(read_tensor(path, name, entries[name]), tensor)
        assert entries[name].begin % tensor.dtype.itemsize == 0
        assert entries[name].weights == tensor.numel()


def test_types_torch_cannot_hold_are_copied_as_bytes(tmp_path):
    path = tmp_path / "x.safetensors"
    tensor = torch.arange(64, dtype=torch.uint8).view(torch.float8_e4m3fn).view(4, 16)
    save_file({"a": tensor, "b": torch.zeros(3)}, path)
    entry = read_header(path)[0]["a"]
    assert (entry.dtype, entry.shape, entry.nbytes) == ("F8_E4M3", (4, 16), 64)
    assert b"".join(read_pieces(path, entry.begin, entry.end)) == bytes(range(64))
    with pytest.raises(SourceError, match=r"x\.safetensors: tensor 'a' has type F8_E4M3"):
        read_tensor(path, "a", entry)


def test_an_empty_file_has_a_layout(tmp_path):
    layout = lay_out({}, {})
    (tmp_path / "x.safetensors").write_bytes(layout.header)
    assert layout.size == len(layout.header)
    assert load_file(tmp_path / "x.safetensors") == {}
    assert read_header(tmp_path / "x.safetensors") == ({}, {})


def test_pieces_of_a_whole_file(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert b"".join(read_pieces(tmp_path / "x")) == b"abc"
    assert b"".join(read_pieces(tmp_path / "x", 1, 2)) == b"b"


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:0],
        lambda data: data[:5],
        lambda data: data[:40],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: data[:8] + b"[" + data[9:],
        lambda data: data.replace(b'"BF16"', b'"BF61"'),
        lambda data: data.replace(b"[2,3]", b"[3,3]"),
        lambda data: data.replace(b"[0,12]", b"[0,14]"),
    ],
)
def test_damaged_files_are_one_sentence(tmp_path, damage):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(2, 3, dtype=torch.bfloat16)}, path)
    path.write_bytes(damage(path.read_bytes()))
    text = rf"^{path}: not a whole safetensors file \(.*\); download it again$"
    with pytest.raises(SourceError, match=text):
        read_header(path)


def test_missing_and_shrinking_files(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(SourceError, match=r"x\.safetensors: the file is missing"):
        read_header(path)
    save_file({"a": torch.zeros(100)}, path)
    entry = read_header(path)[0]["a"]
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(SourceError, match=r"tensor 'a' is truncated"):
        read_tensor(path, "a", entry)
    with pytest.raises(SourceError, match=r"x\.safetensors: truncated while reading"):
        list(read_pieces(path, entry.begin, entry.end))
    path.unlink()
    with pytest.raises(SourceError, match=r"x\.safetensors: cannot be read \(No such file"):
        read_tensor(path, "a", entry)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_damage_never_ends_in_a_traceback(tmp_path, data):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(1, dtype=torch.int8)}, path, {"k": "v"})
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.integers(0, len(raw) - 1))
        raw[where] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)) | st.just(len(raw)))])
    with contextlib.suppress(SourceError):
        for name, entry in read_header(path)[0].items():
            assert tuple(read_tensor(path, name, entry).shape) == entry.shape

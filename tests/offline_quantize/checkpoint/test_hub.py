import fnmatch

import pytest
from huggingface_hub.utils import filter_repo_objects

from offline_quantize.checkpoint.file_patterns import DOWNLOADED, NOT_DOWNLOADED, is_carried
from offline_quantize.checkpoint.hub import locate
from precalib_kernels.errors import SourceError


def test_folders_are_found(tmp_path, monkeypatch):
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert locate("org/model").samefile(tmp_path / "org" / "model")
    assert locate("no/such/folder").name == "folder"


@pytest.mark.parametrize("error", [OSError("no route"), RuntimeError(""), ValueError("bad\nid")])
def test_a_failed_download_is_one_sentence(tmp_path, monkeypatch, error):
    monkeypatch.chdir(tmp_path)

    def fail(*args, **options):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(SourceError, match=r"^org/model: no such folder, and it could not be .*$"):
        locate("org/model")


def test_a_download_is_used(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: "/x/" + name)
    assert str(locate("org/model")) == "/x/org/model"


NAMES = (
    *("config.json", "model-00001-of-00002.safetensors", "2_Dense/model.safetensors"),
    *("LICENSE", "LICENSE.md", "tokenizer.model", "tokenizer.model.v3", "merges.txt", "a/b.jinja"),
    *("modeling_mine.py", "Qwen.TIKTOKEN", "x.tiktoken", "weights.npz", "onnx/model.onnx_data"),
    *("onnx/config.json", "original/params.json", "original/tokenizer.model", "model.GGUF"),
    *("consolidated.safetensors", "pytorch_model.bin", "model.tflite", "model.nemo", "logo.png"),
)


def downloaded(name):
    def match(patterns):
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    return match(DOWNLOADED) and not match(NOT_DOWNLOADED)


def test_what_a_server_needs_is_downloaded_and_nothing_else(tmp_path, monkeypatch):
    """The hub applies its patterns as `downloaded` does."""
    monkeypatch.chdir(tmp_path)
    asked = {}

    def download(name, **options):
        asked.update(options)
        return name

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    locate("org/model")
    assert asked == {"allow_patterns": [*DOWNLOADED], "ignore_patterns": [*NOT_DOWNLOADED]}
    chosen = [name for name in NAMES if downloaded(name)]
    assert chosen == list(filter_repo_objects(NAMES, **asked))
    assert chosen == [
        *("config.json", "model-00001-of-00002.safetensors", "2_Dense/model.safetensors"),
        *("LICENSE", "LICENSE.md", "tokenizer.model", "tokenizer.model.v3", "merges.txt"),
        *("a/b.jinja", "modeling_mine.py", "x.tiktoken"),
    ]
    carried = [name for name in NAMES if is_carried(name)]
    assert carried == [name for name in chosen if not name.endswith(".safetensors")]

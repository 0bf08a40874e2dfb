import pytest

from offline_quantize.checkpoint.file_patterns import SKIPPED_FILES, is_skipped
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


def test_only_files_that_are_skipped_anyway_are_not_downloaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ignored = []

    def download(name, ignore_patterns):
        ignored.extend(ignore_patterns)
        return name

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    locate("org/model")
    assert {"*.bin", "*.gguf"} <= set(ignored) <= set(SKIPPED_FILES)
    assert "*.safetensors" not in ignored
    assert not is_skipped("tokenizer.json")

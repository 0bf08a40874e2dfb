"""`precalib push` against a local stand-in of the Hub's HTTP API, through huggingface_hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_stand_in import COMMIT, Hub, running_hub
from huggingface_hub import HfApi, constants

from offline_quantize.checkpoint.progress import NullProgress
from offline_quantize.commands.push import push
from precalib_kernels.errors import OutputError, PrecalibError, UsageError

TOKEN = "hf_made_up_for_a_test"


@pytest.fixture
def hub():
    with running_hub() as found:
        yield found


@pytest.fixture
def upload(hub, monkeypatch):
    # the Hub's other protocol for large files has a server of its own
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)

    def run(directory, repository="org/name", **options):
        api = HfApi(endpoint=hub.url, token=TOKEN)
        return push(Path(directory), repository, NullProgress(), api=api, **options)

    return run


@pytest.fixture
def packed(checkpoint, quantize):
    files = {"README.md": b"---\nlicense: mit\n---\n", "tokenizer.json": b"{}"}
    return quantize(checkpoint(files=files, shards=2), "--recipe", "rtn-4")


def local(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_the_whole_checkpoint_arrives_in_one_commit(hub, upload, packed):
    address = upload(packed, private=True)
    assert address == f"{hub.url}/org/name/commit/{COMMIT}"
    assert hub.files == local(packed)
    assert {"README.md", "precalib.json", "config.json"} < set(hub.files)
    assert [commit["summary"] for commit in hub.commits] == ["Upload rtn-4 checkpoint"]
    assert hub.private
    assert hub.tokens == {f"Bearer {TOKEN}"}


def test_other_files_of_the_folder_stay_at_home(hub, upload, packed):
    (packed / "notes.txt").write_text("private")
    upload(packed)
    assert "notes.txt" not in hub.files
    assert not hub.private


def test_a_second_time_and_a_branch(hub, upload, packed):
    upload(packed)
    upload(packed, branch="next", message="Again")
    assert hub.branches == ["next"]
    assert hub.commits[-1]["summary"] == "Again"


def test_a_damaged_checkpoint_is_not_uploaded(hub, upload, packed):
    (packed / "tokenizer.json").write_text("[]")
    with pytest.raises(OutputError, match=r"tokenizer\.json: its .* nothing was uploaded"):
        upload(packed)
    assert not hub.created


def test_a_card_of_another_checkpoint_is_not_uploaded(hub, upload, packed, edit_json):
    edit_json(packed / "precalib.json", lambda manifest: manifest | {"note": 1})
    with pytest.raises(OutputError, match=r"README\.md: is of another checkpoint .*precalib card"):
        upload(packed)
    assert not hub.created


def test_weights_that_are_there_already_are_named(hub, upload, packed):
    hub.files["pytorch/old.safetensors"] = b""
    with pytest.raises(OutputError, match=r"holds other weights.*pytorch/old\.safetensors"):
        upload(packed)
    assert hub.commits == []


@pytest.mark.parametrize("name", ["name", "a/b/c", "org/na me", ""])
def test_an_impossible_name_is_refused(upload, packed, name):
    with pytest.raises(UsageError, match="is no id of a repository"):
        upload(packed, name)


def test_what_the_hub_refuses_is_one_sentence(hub, upload, packed):
    with pytest.raises(OutputError, match=r"^other/name: could not be uploaded \(.*403.*\)"):
        upload(packed, "other/name")
    hub.refuse = 400
    with pytest.raises(OutputError, match=r"^org/name: could not be uploaded \(.*\); 'hf auth"):
        upload(packed)


def test_a_hub_that_cannot_be_reached_is_one_sentence(packed, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with running_hub() as hub:
        gone = Hub(hub.url)
    with pytest.raises(PrecalibError, match="could not be uploaded") as raised:
        push(packed, "org/name", NullProgress(), api=HfApi(endpoint=gone.url, token=TOKEN))
    assert TOKEN not in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_the_command_uses_the_users_own_settings(hub, packed, tmp_path):
    settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "offline_quantize.cli.main", "push", packed, "org/name"]
    environment = os.environ | settings | {"HF_HOME": str(tmp_path / "home")}
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"Uploaded: {hub.url}/org/name/commit/{COMMIT}" in done.stdout
    assert json.loads(hub.files["config.json"])["quantization_config"]
    assert hub.tokens == {f"Bearer {TOKEN}"}

"""The text that goes through a model: its size, its seed, its beginning."""

import pytest
import torch
from tiny_models import random_llama

from offline_quantize.calibration.text import own_text, random_tokens, text_of_file
from precalib_kernels.errors import InputError, SourceError

SIZES = {"vocab_size": 260, "hidden_size": 64, "intermediate_size": 96}
BEGIN = 256


@pytest.fixture(scope="module")
def model():
    return random_llama(**SIZES, bos_token_id=BEGIN, max_position_embeddings=128).eval()


@pytest.mark.parametrize("make", [random_tokens, own_text])
def test_as_many_tokens_as_wanted_and_the_same_for_a_seed(model, make):
    text = make(model, 256)
    assert sum(len(window) for window in text) == 256
    assert len({len(window) for window in text}) == 1
    assert all(int(window[0]) == BEGIN for window in text)
    assert torch.equal(torch.stack(text), torch.stack(make(model, 256)))
    assert not torch.equal(torch.stack(text), torch.stack(make(model, 256, seed=1)))


def test_random_tokens_are_of_the_whole_vocabulary(model):
    tokens = torch.cat([window[1:] for window in random_tokens(model, 1 << 15)])
    counts = torch.bincount(tokens, minlength=260)
    assert len(counts) == 260
    assert counts.min() > 60  # of 122 on average
    assert counts.max() < 200


def test_random_tokens_need_no_begin_token():
    model = random_llama(**SIZES, bos_token_id=None)
    assert sum(len(window) for window in random_tokens(model, 64)) == 64


def test_a_file_is_cut_into_windows_of_one_length(model, byte_llama, tmp_path):
    source = byte_llama(hidden_size=64, intermediate_size=96)
    file = tmp_path / "text.txt"
    file.write_text("0123456789" * 40)
    windows = text_of_file(model, source, file, 300)
    assert [len(window) for window in windows] == [128, 128]  # the rest of 46 is left out
    text = [int(token) for window in windows for token in window[1:]]
    assert len(set(text)) == 10
    assert text[:100] == text[10:110]


def test_files_that_are_no_text(model, byte_llama, tmp_path):
    source = byte_llama(hidden_size=64, intermediate_size=96)
    short = tmp_path / "short.txt"
    short.write_text("no")
    with pytest.raises(InputError, match=r"short\.txt: 3 tokens are too few"):
        text_of_file(model, source, short, 300)
    with pytest.raises(InputError, match=r"none\.txt: cannot be read"):
        text_of_file(model, source, tmp_path / "none.txt", 300)
    file = tmp_path / "text.txt"
    file.write_text("0123456789" * 40)
    with pytest.raises(SourceError, match="no tokenizer"):
        text_of_file(model, tmp_path, file, 300)

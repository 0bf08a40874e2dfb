"""The JSON form of an evaluation: what earlier versions wrote is read and written again alike."""

from pathlib import Path

import pytest

from offline_quantize.checkpoint.atomic_files import json_bytes
from offline_quantize.checkpoint.records import read_record
from offline_quantize.evaluation.result import EvaluationResult
from precalib_kernels.errors import InputError

WRITTEN_BY_0_1 = """{
 "directory": "packed",
 "source": "models/original",
 "recipe": "balanced-4",
 "bits_per_weight": 4.317,
 "dtype": "bfloat16",
 "text": {
  "of": "prose.txt",
  "window": 512,
  "tokens": 8176,
  "kl": 0.1078,
  "kl_interval": [
   0.1,
   0.12
  ],
  "kl_99": 0.9,
  "agreement": 0.8,
  "agreement_interval": [
   0.79,
   0.81
  ],
  "perplexity": 12.0,
  "perplexity_interval": [
   11.0,
   13.0
  ],
  "original_perplexity": 10.0,
  "original_perplexity_interval": [
   9.5,
   10.5
  ],
  "others_mass": 0.033
 },
 "tasks": {
  "tasks/quiz.jsonl": {
   "questions": 50,
   "normalisation": "log-likelihood",
   "accuracy": 0.5,
   "accuracy_interval": [
    0.4,
    0.6
   ],
   "original_accuracy": 0.6,
   "original_accuracy_interval": [
    0.5,
    0.7
   ],
   "difference_interval": [
    -0.2,
    0.0
   ],
   "same_choice": 0.9
  }
 }
}
"""


def read(path: Path) -> EvaluationResult:
    return read_record(path, EvaluationResult, InputError, "make it again")


@pytest.mark.parametrize("left_out", [None, "text", "tasks"])
def test_bytes_of_version_0_1(tmp_path: Path, left_out: str | None) -> None:
    text = WRITTEN_BY_0_1
    if left_out == "tasks":
        text = text[: text.index(',\n "tasks"')] + "\n}\n"
    if left_out == "text":
        text = text[: text.index(' "text"')] + text[text.index(' "tasks"') :]
    path = tmp_path / "result.json"
    path.write_text(text)
    found = read(path)
    assert (found.text is None, found.tasks is None) == (left_out == "text", left_out == "tasks")
    assert json_bytes(found.to_json()) == text.encode()


def test_a_field_at_fault_is_named(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(WRITTEN_BY_0_1.replace('"perplexity": 12.0', '"perplexity": "12.0"'))
    with pytest.raises(InputError, match=r"'text' is missing or damaged \(perplexity: input"):
        read(path)

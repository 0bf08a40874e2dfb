import json

import demo
import torch
from safetensors.torch import save_file


def test_linear_bytes_counts_what_replaces_a_weight(tmp_path):
    tensors = {
        "a.q_proj.qweight": torch.zeros(4, 16, dtype=torch.uint8),
        "a.q_proj.scales": torch.zeros(4, 1, dtype=torch.float16),
        "a.q_proj.bias": torch.zeros(4),
        "lm_head.weight": torch.zeros(4, 32),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert demo.linear_bytes(tmp_path, {"a.q_proj": "4-bit"}) == 4 * 16 + 4 * 2


def test_backends_are_read_from_the_file_of_choices(tmp_path):
    choices = tmp_path / "backends.jsonl"
    names = ("dense", "reference", "dense")
    choices.write_text("".join(json.dumps({"backend": name}) + "\n" for name in names))
    assert demo.backends(choices) == {"dense", "reference"}

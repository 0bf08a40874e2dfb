"""How far a quantized model is from its original, measured on text: KL divergence per token."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from offline_quantize.packed import PackedCheckpoint
from precalib_kernels.errors import SourceError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WINDOW = 512  # tokens a model sees at once; windows do not overlap
BOOTSTRAP = 1000


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Per-token measurements of a model against its original, over the same predicted tokens.

    kl:        KL(original ‖ quantized) of the next-token distributions, in nats.
    agreement: whether both put the same token first.
    loss, original_loss: −log p of the token that follows, in nats.
    """

    kl: Tensor
    agreement: Tensor
    loss: Tensor
    original_loss: Tensor

    def summary(self) -> dict[str, Any]:
        """Means, and 95 % intervals by bootstrap over the windows' tokens (seeded)."""
        generator = torch.Generator().manual_seed(0)
        picks = torch.randint(len(self.kl), (BOOTSTRAP, len(self.kl)), generator=generator)
        means = self.kl[picks].mean(1).sort().values
        low, high = (float(means[int(q * BOOTSTRAP)]) for q in (0.025, 0.975))
        return {
            "tokens": len(self.kl),
            "kl": float(self.kl.mean()),
            "kl_interval": [low, high],
            "kl_99": float(self.kl.quantile(0.99)),
            "agreement": float(self.agreement.float().mean()),
            "perplexity": float(self.loss.mean().exp()),
            "original_perplexity": float(self.original_loss.mean().exp()),
        }


def load_model(directory: Path) -> "PreTrainedModel":
    """The checkpoint's model in bfloat16, for inference.

    Raises SourceError when transformers is missing or cannot load it.
    """
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise SourceError("evaluation needs transformers; install vllm-precalib[eval]") from error
    try:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    except (OSError, ValueError, KeyError) as error:
        raise SourceError(f"{directory}: transformers cannot load it ({error})") from error
    return model.eval()


def token_windows(directory: Path, text: str, limit: int) -> Tensor:
    """The text's tokens as windows [n, WINDOW], at most `limit` tokens."""
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(directory)(text, return_tensors="pt").input_ids[0]
    count = min(len(tokens), limit) // WINDOW
    if not count:
        raise SourceError(f"the text has {len(tokens)} tokens; at least {WINDOW} are needed")
    return tokens[: count * WINDOW].view(count, WINDOW)


def replace_weights(model: "PreTrainedModel", weights: Mapping[str, Callable[[], Tensor]]) -> None:
    """Put other values into the named modules of a model, in its own type."""
    modules = dict(model.named_modules())
    for name, weight in weights.items():
        if name not in modules:
            raise SourceError(f"the model has no module '{name}'; is this its source checkpoint?")
        modules[name].weight.data.copy_(weight())


def packed_weights(packed: PackedCheckpoint) -> dict[str, Callable[[], Tensor]]:
    """Weight of every packed module, computed when it is asked for."""
    return {name: functools.partial(packed.weight, name) for name in packed.config.modules}


@torch.inference_mode()
def log_probabilities(model: "PreTrainedModel", windows: Tensor) -> Sequence[Tensor]:
    """log p of every next token, one float32 [WINDOW - 1, vocabulary] tensor per window."""
    return [model(window[None]).logits[0, :-1].float().log_softmax(-1) for window in windows]


@torch.inference_mode()
def compare(original: Sequence[Tensor], model: "PreTrainedModel", windows: Tensor) -> Comparison:
    """Measure a model against the original's log probabilities on the same windows."""
    columns: dict[str, list[Tensor]] = {"kl": [], "same": [], "loss": [], "original": []}
    for reference, window in zip(original, windows, strict=True):
        own = model(window[None]).logits[0, :-1].float().log_softmax(-1)
        target = window[1:, None]
        columns["kl"].append((reference.exp() * (reference - own)).sum(-1))
        columns["same"].append(reference.argmax(-1) == own.argmax(-1))
        columns["loss"].append(-own.gather(1, target)[:, 0])
        columns["original"].append(-reference.gather(1, target)[:, 0])
    return Comparison(*(torch.cat(column) for column in columns.values()))

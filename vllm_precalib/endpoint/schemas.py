"""What the API takes and returns, as JSON."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

MOST_ALTERNATIVES = 10
MOST_TOKENS = 1024
MOST_LETTERS = 32_000


class Weight(BaseModel):
    """One packed weight, as the manifest records it.

    layer, kind:    of "model.layers.3.mlp.down_proj": 3 and "mlp.down_proj".
    shape:          [N, K].
    bits:           effective bits;  relative_error: ‖W − Ŵ‖² / ‖W‖².
    """

    module: str
    layer: int | None
    kind: str
    recipe: str
    shape: tuple[int, int]
    bits: float
    relative_error: float
    salient_share: float


class Report(BaseModel):
    """What the manifest of the served model says.

    effective_bits: per packed weight, all stored bytes counted.
    unquantized:    names of the tensors that stay as they are, by reason.
    """

    model: str
    recipe: str
    precalib: str
    effective_bits: float
    packed_weights: int
    packed_bytes: int
    source_bytes: int
    unquantized_bytes: int
    relative_error: float
    weights: list[Weight]
    unquantized: dict[str, list[str]]


class BackendOfLayer(BaseModel):
    """Which backend computes a layer of one rank, and why none of the others."""

    layer: str
    layout_name: str
    rank: int
    backend: str
    asked_for: bool
    reasons: dict[str, str]


class RecordedChoice(BackendOfLayer):
    """A line of `choices_file`: a choice, and of which model and which run of vLLM it is."""

    model: str
    run: str


class Backends(BaseModel):
    """The choice for every packed layer; `missing` says why there is none to show."""

    layers: list[BackendOfLayer]
    missing: str | None = None


class Live(BaseModel):
    """The engine's metrics now, and rates since the last look.

    at:                 seconds since 1970.
    kv_cache_share:     of the KV cache in use, 0 to 1.
    *_per_second:       None at the first look.
    first_token_seconds, token_seconds: means since the last look; None if nothing was measured.
    nan_requests:       with NaN in their logits, since the start; None if that is not counted.
    """

    at: float
    running: int
    waiting: int
    kv_cache_share: float
    generated_tokens: int
    generated_per_second: float | None = None
    prompt_per_second: float | None = None
    first_token_seconds: float | None = None
    token_seconds: float | None = None
    nan_requests: int | None = None


class Prompt(BaseModel):
    """A prompt to try.

    chat:         whether it is a user's message, for a model with a chat template.
    alternatives: how many of the likeliest tokens to return at each position.
    """

    model_config = ConfigDict(extra="forbid")

    prompt: Annotated[str, Field(min_length=1, max_length=MOST_LETTERS)]
    chat: bool = False
    max_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] = 64
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    alternatives: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)] = 5


class Alternative(BaseModel):
    """A token that could have stood here."""

    text: str
    probability: float


class Token(BaseModel):
    """A token of the answer, with the probability the model gave it."""

    kind: Literal["token"] = "token"
    text: str
    probability: float
    alternatives: list[Alternative] = []


class ComparedToken(BaseModel):
    """The same token as the other server's model sees it.

    kl: KL(other ‖ served) in nats at this position, at least: tokens that one of the two does not
        list count as one.
    """

    text: str
    probability: float
    alternatives: list[Alternative]
    kl: float


class Comparison(BaseModel):
    """The answer's tokens under the model of the other server."""

    kind: Literal["comparison"] = "comparison"
    against: str
    tokens: list[ComparedToken]
    mean_kl: float


class Problem(BaseModel):
    """Why no answer, or no comparison, comes."""

    kind: Literal["problem"] = "problem"
    text: str


class Done(BaseModel):
    """The end of an answer."""

    kind: Literal["done"] = "done"
    tokens: int
    seconds: float


Event = Token | Comparison | Problem | Done


class About(BaseModel):
    """What is served.

    against: address of the other server that answers are compared with; None if there is none.
    """

    model: str
    precalib: str
    vllm: str
    against: str | None

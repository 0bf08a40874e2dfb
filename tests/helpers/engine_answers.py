"""Answers of a vLLM engine against the truth."""


def assert_same(pair, tolerance):
    """Equal tokens, and log probabilities that differ by at most `tolerance`, of three prompts."""
    served, truth = pair
    assert len(served) == len(truth) == 3
    for steps, true_steps in zip(served, truth, strict=True):
        assert [token for token, _ in steps] == [token for token, _ in true_steps]
        for (_, logprob), (_, true_logprob) in zip(steps, true_steps, strict=True):
            assert abs(logprob - true_logprob) <= tolerance

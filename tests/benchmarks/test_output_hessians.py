"""Hessians of the loss, against autograd's gradient of each sample."""

import pytest
import torch
from tiny_models import random_llama
from torch.nn.functional import cross_entropy

from precalib_kernels.errors import UsageError

SIZES = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4}


@pytest.fixture
def hessians(load):
    return load("output_hessians")


@pytest.fixture
def model():
    """Grouped-query attention, and a head that is the embeddings."""
    return random_llama(**SIZES, num_key_value_heads=2, tie_word_embeddings=True).eval()


def text(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(SIZES["vocab_size"], (n,), generator=generator) for n in lengths]


def linear_layers(model):
    return {f"model.{n}": m for n, m in model.model.named_modules() if hasattr(m, "in_features")}


def observed(model, window):
    """Of every linear layer: inputs [T, K] and the loss's gradients at its outputs [T, N]."""
    inputs, outputs, handles = {}, {}, []
    for name, module in linear_layers(model).items():

        def record(_, given, output, name=name):
            inputs[name], outputs[name] = given[0][0].detach(), output

        handles.append(module.register_forward_hook(record))
    logits = model(window[None]).logits[0, :-1]
    loss = cross_entropy(logits, window[1:], reduction="sum")
    gradients = torch.autograd.grad(loss, list(outputs.values()))
    for handle in handles:
        handle.remove()
    return {n: (inputs[n], g[0]) for n, g in zip(outputs, gradients, strict=True)}


def scaled(hessian, mean_square):
    return hessian * (mean_square.sum() / hessian.trace())


@pytest.mark.parametrize(("batch", "lengths"), [(1, (9, 9, 12)), (2, (9, 9, 9)), (3, (9, 9, 12))])
def test_whole_windows_give_the_products_of_each_samples_weight_gradients(
    hessians, model, batch, lengths
):
    windows = text(*lengths)
    expected = dict.fromkeys(linear_layers(model), 0.0)
    for window in windows:
        model.zero_grad()
        model(window[None], labels=window[None]).loss.mul(len(window) - 1).backward()
        for name, module in linear_layers(model).items():
            expected[name] = expected[name] + module.weight.grad.T @ module.weight.grad
    squares = [
        {name: x.square().sum(0) for name, (x, _) in observed(model, window).items()}
        for window in windows
    ]
    found = dict(hessians.output_hessians(model, windows, batch=batch))
    assert found.keys() == expected.keys()
    for name, statistics in found.items():
        mean_square = sum(square[name] for square in squares) / sum(lengths)
        torch.testing.assert_close(statistics.mean_square, mean_square, rtol=1e-4, atol=1e-7)
        wanted = scaled(expected[name], mean_square)
        torch.testing.assert_close(
            statistics.hessian, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max())
        )


@pytest.mark.parametrize("piece", [1, 4])
def test_pieces_treat_their_tokens_alone_as_dependent(hessians, model, piece):
    windows = text(10, 10)
    found = dict(hessians.output_hessians(model, windows, piece=piece, batch=2))
    seen = [observed(model, window) for window in windows]
    for name, statistics in found.items():
        expected = 0
        for sample in seen:
            x, d = sample[name]
            for start in range(0, 10, piece):
                gradient = sum(
                    torch.outer(d[t], x[t]) for t in range(start, min(start + piece, 10))
                )
                expected = expected + gradient.T @ gradient
        wanted = scaled(expected, statistics.mean_square)
        torch.testing.assert_close(
            statistics.hessian, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max())
        )


def test_one_token_pieces_are_inputs_weighted_by_their_gradient(hessians, model):
    (window,) = text(12)
    found = dict(hessians.output_hessians(model, [window], piece=1))
    for name, (x, d) in observed(model, window).items():
        expected = x.T @ d.square().sum(1).diag() @ x
        wanted = scaled(expected, found[name].mean_square)
        torch.testing.assert_close(
            found[name].hessian, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max())
        )


def test_labels_of_the_model_are_drawn_from_its_distribution(hessians, model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 8  # a distribution that is far from even
    (window,) = text(3)
    name, module = "model.layers.0.self_attn.k_proj", model.model.layers[0].self_attn.k_proj
    logits = model(window[None]).logits[0, :-1]
    # Labels are independent and each score's mean is zero, so that of a product of two is, too. The
    # first token attends to itself alone, whatever its key; the second gives keys a gradient.
    expected = 0
    for log_p in logits.log_softmax(1):
        for token, p in enumerate(log_p.exp().detach()):
            (gradient,) = torch.autograd.grad(-log_p[token], module.weight, retain_graph=True)
            expected = expected + p * gradient.T @ gradient
    found = dict(hessians.output_hessians(model, [window] * 3000, labels="model", batch=500))[name]
    of_text = dict(hessians.output_hessians(model, [window]))[name].hessian
    wanted = scaled(expected, found.mean_square)
    error = (found.hessian - wanted).norm() / wanted.norm()
    assert error < 0.05
    assert (of_text - wanted).norm() / wanted.norm() > 2 * error
    again = dict(hessians.output_hessians(model, [window] * 3000, labels="model", batch=500))[name]
    assert torch.equal(again.hessian, found.hessian)
    other = dict(
        hessians.output_hessians(model, [window] * 3000, labels="model", batch=500, seed=1)
    )[name]
    assert not torch.equal(other.hessian, found.hessian)


@pytest.mark.parametrize("outputs", [3, 60])
@pytest.mark.parametrize("piece", [None, 1, 5, 16, 100])
def test_both_ways_to_compute_the_products_are_the_definition(hessians, outputs, piece):
    x, d = torch.randn(17, 11).double(), torch.randn(17, outputs).double()
    size = piece or 17
    gradients = [a.T @ b for a, b in zip(d.split(size), x.split(size), strict=True)]
    expected = sum(gradient.T @ gradient for gradient in gradients)
    found = hessians.gradient_products(x.float(), d.float(), piece)
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("size", [1e-24, 1e24])
def test_gradients_of_any_size_give_the_same_hessian(hessians, model, size):
    windows = text(9)
    expected = dict(hessians.output_hessians(model, windows))
    original = torch.nn.functional.cross_entropy

    def sized(*arguments, **keywords):
        return original(*arguments, **keywords) * size

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "cross_entropy", sized)
        found = dict(hessians.output_hessians(model, windows))
    for name, statistics in found.items():
        torch.testing.assert_close(statistics.hessian, expected[name].hessian, rtol=1e-3, atol=1e-6)


def test_the_last_block_comes_first_and_the_model_stays_as_it_was(hessians, model):
    model.model.norm.weight.requires_grad_(False)
    before = {name: (p.requires_grad, p.clone()) for name, p in model.named_parameters()}
    names = [name for name, _ in hessians.output_hessians(model, text(6))]
    assert [name.split(".")[2] for name in names] == ["1"] * 7 + ["0"] * 7
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == before[name][0]
        assert torch.equal(parameter, before[name][1])
        assert parameter.grad is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_layer_without_gradient_gets_its_inputs_sizes(hessians, model):
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    found = dict(hessians.output_hessians(model, text(8)))["model.layers.1.mlp.gate_proj"]
    assert torch.equal(found.hessian, found.mean_square.diag())
    assert float(found.mean_square.min()) > 0


def test_a_model_in_float16_is_refused(hessians, model):
    with pytest.raises(UsageError, match="float16 underflow; load it in bfloat16"):
        next(hessians.output_hessians(model.half(), text(6)))


def test_a_layer_that_does_not_see_windows_needs_batches_of_one(hessians, model):
    class Flat(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(40, 24)

        def forward(self, x):
            return self.inner(x.flatten(0, 1)).view(*x.shape[:2], -1)

    model.model.layers[1].mlp.down_proj = Flat()
    with pytest.raises(UsageError, match=r"down_proj\.inner: .* use a batch of 1"):
        next(hessians.output_hessians(model, text(6, 6), batch=2))
    assert len(dict(hessians.output_hessians(model, text(6, 6)))) == 14


def test_a_model_without_a_list_of_blocks_is_refused(hessians, model):
    model.model.layers.append(torch.nn.Identity())
    with pytest.raises(UsageError, match="LlamaForCausalLM has no list of 2 blocks"):
        next(hessians.output_hessians(model, text(6)))

"""clip_loss and sigmoid_loss over many panels, against the formulas of open_clip in float64."""

import pytest
import torch
import torch.nn.functional as F

import ltood_fast as lt


def clip(image, text, scale, bias):
    logits, labels = scale * image @ text.T + bias, torch.arange(len(image))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def sigmoid(image, text, scale, bias):
    labels = 2 * torch.eye(len(image), dtype=image.dtype) - 1
    return -F.logsigmoid(labels * (scale * image @ text.T + bias)).sum() / len(image)


LOSSES = {"clip_loss": (lt.clip_loss, clip), "sigmoid_loss": (lt.sigmoid_loss, sigmoid)}


def features(n, d=24, noise=0.5):
    g = torch.Generator().manual_seed(n)
    image = F.normalize(torch.randn(n, d, generator=g), dim=1)
    return image, F.normalize(image + noise * torch.randn(n, d, generator=g) / d**0.5, dim=1)


def with_gradients(loss, given, frozen=()):
    leaves = [x.detach().clone().requires_grad_(i not in frozen) for i, x in enumerate(given)]
    value = loss(*leaves)
    value.backward()
    return value.detach(), [x.grad for x in leaves]


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("n", [1, 5, 300, 1500])
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_all_gradients_are_open_clips(name, n, scale):
    ours, theirs = LOSSES[name]
    given = *features(n), torch.tensor(scale), torch.tensor(-3.0)
    value, gradients = with_gradients(ours, given)
    true_value, truth = with_gradients(theirs, [x.double() for x in given])
    torch.testing.assert_close(value.double(), true_value, rtol=1e-5, atol=1e-12)
    for gradient, expected in zip(gradients, truth, strict=True):
        assert (gradient - expected).norm() <= 1e-4 * expected.norm() + 1e-9


@pytest.mark.parametrize("name", LOSSES)
def test_numbers_serve_as_scale_and_bias(name):
    ours, theirs = LOSSES[name]
    image, text = features(20)
    torch.testing.assert_close(ours(image, text, 7.0, -2.0), theirs(image, text, 7.0, -2.0))


def test_no_bias_is_needed_for_clip():
    image, text = features(20)
    assert lt.clip_loss(image, text, 7.0) == lt.clip_loss(image, text, 7.0, -2.0)


@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("name", LOSSES)
def test_frozen_towers(name, frozen):
    given = *features(300), torch.tensor(5.0), torch.tensor(-3.0)
    value, every = with_gradients(LOSSES[name][0], given)
    same, some = with_gradients(LOSSES[name][0], given, frozen)
    assert torch.equal(value, same)
    for i, (gradient, expected) in enumerate(zip(some, every, strict=True)):
        if i in frozen:
            assert gradient is None
        else:
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("bias", [-10.0, -40.0])
def test_converged_sigmoid_losses_keep_their_digits(bias):
    """4,900 negatives of e^-20 and less, which 1 + e would round away in float32."""
    image = torch.eye(70)
    rows = lt.sigmoid_loss(image, image, 60.0, bias, reduction="none")
    true = lt.reference.sigmoid_loss(image.double(), image.double(), 60.0, bias, reduction="none")
    assert (rows > 0).all()
    torch.testing.assert_close(rows.double(), true, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_one_and_two_threads_give_the_same_bits(name):
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            results.append(with_gradients(LOSSES[name][0], (*features(700), torch.tensor(9.0), torch.tensor(-3.0))))
        finally:
            torch.set_num_threads(before)
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_opcheck():
    image, text = (x.requires_grad_() for x in features(6, 4))
    number = torch.tensor(3.0, requires_grad=True), torch.tensor(-1.0, requires_grad=True)
    torch.library.opcheck(torch.ops.ltood_fast.sigmoid_loss.default, (image, text, *number), {})


@pytest.mark.parametrize(
    ("given", "kind", "sentence"),
    [
        ({"text_features": torch.randn(5, 4)}, ValueError, "text_features must be of one row for each row of image"),
        ({"logit_scale": -1.0}, ValueError, "logit_scale must be positive"),
        ({"logit_scale": torch.tensor(0.0)}, ValueError, "logit_scale must be positive"),
        ({"logit_scale": torch.ones(3)}, ValueError, "logit_scale must be a float or a float tensor of one element"),
        ({"logit_bias": torch.tensor(1)}, TypeError, "logit_bias must be a number or a float tensor of one element"),
        ({"image_features": torch.full((6, 4), 1e18)}, ValueError, "image_features and text_features must be of rows"),
    ],
)
@pytest.mark.parametrize("name", LOSSES)
def test_a_wrong_argument_ends_in_one_sentence(name, given, kind, sentence):
    right = {"image_features": torch.randn(6, 4), "text_features": torch.randn(6, 4), "logit_scale": 1.0}
    with pytest.raises(kind, match=f"^{name}: {sentence}"):
        LOSSES[name][0](**({**right, "logit_bias": 0.0} | given))

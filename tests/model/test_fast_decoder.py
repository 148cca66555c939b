"""The fast decoders: cost, flat areas, finite halo, folding of the time, the linear base."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ssdd import SSDD
from ssdd.engine.checkpoint import save_tensors
from ssdd.engine.errors import UserError
from ssdd.engine.recompute import recompute_activations
from ssdd.model.fast_decoder import FAST_SIZES, FastDecoder, FastSize, size_of_weights
from ssdd.model.flow import predict_data

TINY = FastSize(16, 2, (8, 8, 4))


def randomised(decoder: FastDecoder) -> FastDecoder:
    """Weights as after training: nothing that starts at zero is zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return decoder.eval()


@pytest.mark.parametrize(("name", "gflop"), [("F-XS", 4.8), ("F-S", 13), ("F-B", 26)])
def test_cost_of_256_pixels(name, gflop):
    with torch.device("meta"):
        decoder = FastDecoder(FAST_SIZES[name], 8, 4)
        with FlopCounterMode(display=False) as counter:
            decoder(torch.empty(1, 3, 256, 256), 1.0, torch.empty(1, 4, 32, 32))
    assert counter.get_total_flops() / 1e9 == pytest.approx(gflop, rel=0.03)


@pytest.mark.parametrize("stride", [4, 8, 16, 32])
@pytest.mark.parametrize("trunk", ["depthwise", "plain"])
def test_a_pixel_depends_on_the_halo_and_on_nothing_further(stride, trunk):
    decoder = randomised(FastDecoder(FastSize(16, 2, (8, 8, 4), coarse_depth=1, trunk=trunk), stride, 3)).double()
    cells, side, across = 4 * decoder.halo + 8, stride, decoder.fold_in
    z = torch.randn(1, 3, cells, cells, dtype=torch.float64, requires_grad=True)
    x_t = torch.randn(1, 3, cells * side, cells * side, dtype=torch.float64)
    middle = cells // 2 // across * across  # the first latent cell of a cell of the trunk
    pixels = slice(middle * side, (middle + across) * side)
    decoder(x_t, 0.5, z)[..., pixels, pixels].sum().backward()
    reached = z.grad.abs().sum((0, 1)).nonzero()
    assert (reached.amin(), reached.amax()) == (middle - decoder.halo, middle + across - 1 + decoder.halo)


def test_a_constant_latent_gives_a_flat_image():
    torch.manual_seed(0)
    decoder = FastDecoder(FAST_SIZES["F-XS"], 8, 4).eval()
    torch.nn.init.normal_(decoder.conv_out.weight)
    z = torch.randn(1, 4, 1, 1).expand(-1, -1, 2 * decoder.halo + 6, 2 * decoder.halo + 6)
    side = 8 * z.shape[-1]
    with torch.no_grad():
        image = decoder(torch.zeros(1, 3, side, side), 1.0, z)  # x = x_t + t v
    edge = 8 * decoder.halo
    interior = image[..., edge:-edge, edge:-edge].double()
    spectrum = torch.fft.fft2(interior).abs().square().sum((0, 1))
    assert spectrum[0, 0] > 0
    assert (spectrum.sum() - spectrum[0, 0]) / spectrum.sum() < 0.01


@pytest.mark.parametrize("trunk", ["depthwise", "plain"])
@pytest.mark.parametrize("t", [1.0, 0.3])
def test_folding_the_time_changes_nothing(trunk, t):
    decoder = randomised(FastDecoder(FastSize(16, 3, (8, 8, 4), trunk=trunk), 8, 4))
    x_t, z = torch.randn(2, 3, 32, 48), torch.randn(2, 4, 4, 6)
    with torch.no_grad():
        folded = decoder.fold(t)
        assert not any("modulation" in name or "time_embedding" in name for name in folded.state_dict())
        torch.testing.assert_close(folded(x_t, t, z), decoder(x_t, t, z), rtol=1e-5, atol=1e-5)


def test_without_a_network_it_is_the_linear_optimum():
    """With F = 0 the estimate of x is base + Wiener filter of the residual, as of a Gaussian of deviation s."""
    decoder = FastDecoder(TINY, 8, 4)
    weight, bias = torch.randn(192, 4), torch.randn(192)
    decoder.set_base(weight, bias)
    z, x_t, t, s = torch.randn(1, 4, 2, 2), torch.randn(1, 3, 16, 16), torch.tensor(0.6), TINY.residual_std
    cells = torch.einsum("oc,bchw->bohw", weight, z) + bias[:, None, None]
    base = torch.nn.functional.pixel_shuffle(cells, 8)
    gain = (1 - t) * s**2 / ((1 - t) ** 2 * s**2 + t**2)
    with torch.no_grad():
        estimate = predict_data(x_t, decoder(x_t, t, z), t)
    torch.testing.assert_close(estimate, base + gain * (x_t - (1 - t) * base), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", ["residual", "x"])
def test_at_the_first_step_one_step_gives_the_base(prediction):
    decoder = FastDecoder(FastSize(16, 2, (8, 8, 4), prediction=prediction), 8, 4)
    decoder.set_base(torch.randn(192, 4), torch.randn(192))
    z, noise, one = torch.randn(2, 4, 2, 2), torch.randn(2, 3, 16, 16), torch.ones(())
    with torch.no_grad():
        condition = decoder.condition(z, 16, 16)
        image = predict_data(noise, decoder.velocity(noise, one, condition), one)
    torch.testing.assert_close(image, condition.base, rtol=1e-5, atol=1e-5)


def test_tokens_are_the_trunk_after_a_block_and_every_parameter_gets_a_gradient():
    decoder = randomised(FastDecoder(FastSize(16, 3, (8, 8, 4), coarse_depth=1, statistics=True), 16, 4))
    condition = decoder.condition(torch.randn(2, 4, 2, 3), 32, 48)
    v, tokens = decoder.velocity_and_tokens(torch.randn(2, 3, 32, 48), torch.rand(2), condition, keep=1)
    assert tokens.shape == (2, 4, 6, 16)
    (v.sum() + tokens.sum()).backward()
    assert [name for name, p in decoder.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_statistics_of_the_whole_latent_reach_its_tiles():
    decoder = randomised(FastDecoder(FastSize(16, 1, (8, 8, 4), statistics=True), 8, 4))
    z = torch.randn(1, 4, 4, 4)
    tile = z[..., :2, :2]
    alone, of_whole = decoder.condition(tile, 16, 16), decoder.condition(tile, 16, 16, whole=z)
    assert not torch.equal(alone.features, of_whole.features)
    corner = decoder.condition(z, 32, 32).features[..., :1, :1]
    torch.testing.assert_close(of_whole.features[..., :1, :1], corner)


def test_sizes_are_checked():
    decoder = FastDecoder(TINY, 16, 4)
    with pytest.raises(ValueError, match="multiples of 16"):
        decoder(torch.zeros(1, 3, 24, 32), 1.0, torch.zeros(1, 4, 2, 2))
    with pytest.raises(ValueError, match="does not fit 4 channels"):
        decoder(torch.zeros(1, 3, 32, 32), 1.0, torch.zeros(1, 3, 2, 2))
    with pytest.raises(UserError, match="power of two, got 12"):
        FastDecoder(TINY, 12, 4)
    with pytest.raises(ValueError, match="residual_std must be positive"):
        FastSize(16, 2, (8, 8, 4), residual_std=0)


# In a tokenizer


def tokenizer(**options) -> SSDD:
    size = {"size": "F-XS", "width": 16, "depth": 2, "thin": [8, 8, 4], **options}
    model = SSDD({"name": "f8c4", "width": 8}, size)
    randomised(model.decoder)
    return model.eval()


@pytest.mark.parametrize("options", [{}, {"trunk": "plain", "statistics": True, "prediction": "x"}])
def test_a_file_with_or_without_its_configuration_gives_the_same_images(options, tmp_path):
    model = tokenizer(**options)
    model.save_pretrained(tmp_path)
    z, noise = torch.randn(2, 4, 2, 3), torch.randn(2, 3, 16, 24)
    expected = model.decode(z, 2, noise)
    assert torch.equal(SSDD.from_pretrained(tmp_path).decode(z, 2, noise), expected)
    bare = tmp_path / "bare.safetensors"
    save_tensors(bare, model.state_dict())
    given = {} if not options else {"decoder": model.config["decoder"]}  # tensors do not say what is predicted
    assert torch.equal(SSDD.from_pretrained(bare, **given).decode(z, 2, noise), expected)


@pytest.mark.parametrize("name", FAST_SIZES)
def test_the_named_sizes_are_recognised_by_their_tensors(name):
    with torch.device("meta"):
        weights = FastDecoder(FAST_SIZES[name], 16, 4).state_dict()
    assert size_of_weights(weights) == name


def test_one_latent_serves_several_noises_and_slices_change_nothing():
    model = tokenizer()
    z, noise = torch.randn(3, 4, 2, 2), torch.randn(3, 3, 16, 16)
    whole = model.decode(z, 2, noise)
    model.enable_slicing(2)
    torch.testing.assert_close(model.decode(z, 2, noise), whole, rtol=1e-5, atol=1e-5)
    condition = model.decoder.condition(z[:1], 16, 16)
    with torch.no_grad():
        several = model.decoder.velocity(noise, torch.ones(()), condition)
        one = model.decoder.velocity(noise[1:2], torch.ones(()), condition)
    torch.testing.assert_close(several[1:2], one, rtol=1e-5, atol=1e-5)


def test_one_image_stands_for_all_latents_and_other_numbers_are_refused():
    decoder = tokenizer().decoder
    z, x_t, t = torch.randn(3, 4, 2, 2), torch.randn(1, 3, 16, 16), torch.rand(3)
    condition = decoder.condition(z, 16, 16)
    with torch.no_grad():
        several = decoder.velocity(x_t, t, condition)
        torch.testing.assert_close(several[1:2], decoder(x_t, t[1:2], z[1:2]), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="2 images, 3 latents and 1 times do not match"):
        decoder.velocity(x_t.expand(2, -1, -1, -1), torch.ones(()), condition)


@pytest.mark.parametrize("folded", [False, True])
def test_it_compiles_to_one_graph_of_the_same_results(folded):
    decoder = tokenizer(statistics=True).decoder
    decoder = decoder.fold(1.0) if folded else decoder
    x_t, z = torch.randn(2, 3, 16, 24), torch.randn(2, 4, 2, 3)
    with torch.no_grad():
        eager = decoder(x_t, 1.0, z)
        decoder.compile(backend="eager", fullgraph=True)
        torch.testing.assert_close(decoder(x_t, 1.0, z), eager)


def test_half_precision_stays_near_float32():
    model = tokenizer()
    z, noise = torch.randn(1, 4, 4, 4), torch.randn(1, 3, 32, 32)
    exact = model.decode(z, 1, noise)
    half = copy.deepcopy(model).bfloat16().decode(z, 1, noise)
    assert half.dtype == torch.float32
    assert (half - exact).abs().mean() < 0.02 * exact.std()


def test_gradients_are_those_without_recomputation():
    model = tokenizer(coarse_depth=1)
    z, x_t = torch.randn(2, 4, 2, 2), torch.randn(2, 3, 16, 16)

    def gradients() -> list[torch.Tensor]:
        model.decoder.zero_grad()
        model.decoder(x_t, 0.5, z).square().sum().backward()
        return [p.grad.clone() for p in model.decoder.parameters()]

    plain = gradients()
    recompute_activations(model.decoder)
    torch.testing.assert_close(gradients(), plain)

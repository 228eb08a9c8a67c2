import pytest
import torch

from capo.backbones.latents import to_denoiser
from capo.shapes.make import autoencoder, flow_autoencoder


@pytest.fixture
def pictures():
    return torch.rand(20, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_scaled_latents_are_standard_to_the_denoiser_and_decode_to_the_same_pictures(pictures):
    torch.manual_seed(0)
    vae = flow_autoencoder.build().eval()
    with torch.no_grad():
        vae.encoder.conv_out.weight[:8] *= torch.linspace(0.5, 3, 8)[:, None, None, None]
        vae.encoder.conv_out.bias[:8] = torch.linspace(-1, 2, 8)
        before = vae.encode(pictures).latent_dist
        first, scale = vae.decoder.conv_in(before.mean), before.mean.std((0, 2, 3))
        after = flow_autoencoder.scaled(vae, pictures).encode(pictures).latent_dist
        seen = to_denoiser(vae, after.mean)
        assert seen.shape == (20, 8, 8, 8)
        torch.testing.assert_close(seen.mean((0, 2, 3)), torch.zeros(8), atol=1e-4, rtol=0)
        torch.testing.assert_close(seen.std((0, 2, 3)), torch.ones(8), atol=1e-4, rtol=0)
        torch.testing.assert_close(after.std * vae.config.scaling_factor, before.std / scale[:, None, None], atol=1e-5, rtol=1e-3)
        # the decoder's first convolution is the same but at the border, where zeros are padded before the bias
        second = vae.decoder.conv_in(after.mean)
    torch.testing.assert_close(second[..., 1:-1, 1:-1], first[..., 1:-1, 1:-1], atol=1e-4, rtol=1e-4)
    assert (second - first)[..., 0, :].abs().max() > 1e-3


def test_a_deepened_autoencoder_has_the_outer_levels_of_the_shallow_one():
    torch.manual_seed(0)
    shallow = autoencoder.build()
    deep = flow_autoencoder.deepened(shallow)
    assert torch.equal(deep.encoder.conv_in.weight, shallow.encoder.conv_in.weight)
    assert torch.equal(deep.encoder.down_blocks[1].resnets[0].conv1.weight, shallow.encoder.down_blocks[1].resnets[0].conv1.weight)
    for mine, its in ((3, 2), (2, 1)):  # counted from the innermost
        assert torch.equal(deep.decoder.up_blocks[mine].resnets[1].conv2.weight, shallow.decoder.up_blocks[its].resnets[1].conv2.weight)
    assert torch.equal(deep.decoder.conv_out.weight, shallow.decoder.conv_out.weight)
    assert deep.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mean.shape == (1, 8, 8, 8)

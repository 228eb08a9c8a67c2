import numpy as np
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
        torch.testing.assert_close(
            after.std * vae.config.scaling_factor, before.std / scale[:, None, None], atol=1e-5, rtol=1e-3
        )
        # the decoder's first convolution is the same except at the border, where zeros are padded before the
        # bias
        second = vae.decoder.conv_in(after.mean)
    torch.testing.assert_close(second[..., 1:-1, 1:-1], first[..., 1:-1, 1:-1], atol=1e-4, rtol=1e-4)
    assert (second - first)[..., 0, :].abs().max() > 1e-3


def test_a_deepened_autoencoder_has_the_outer_levels_of_the_shallow_one():
    torch.manual_seed(0)
    shallow = autoencoder.build()
    deep = flow_autoencoder.deepened(shallow)
    assert torch.equal(deep.encoder.conv_in.weight, shallow.encoder.conv_in.weight)
    assert torch.equal(
        deep.encoder.down_blocks[1].resnets[0].conv1.weight,
        shallow.encoder.down_blocks[1].resnets[0].conv1.weight,
    )
    for mine, its in ((3, 2), (2, 1)):  # counted from the innermost
        assert torch.equal(
            deep.decoder.up_blocks[mine].resnets[1].conv2.weight,
            shallow.decoder.up_blocks[its].resnets[1].conv2.weight,
        )
    assert torch.equal(deep.decoder.conv_out.weight, shallow.decoder.conv_out.weight)
    assert deep.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mean.shape == (1, 8, 8, 8)


def test_training_ends_in_a_folder_and_in_latents_of_all_scenes(tmp_path):
    torch.manual_seed(0)
    torch.save({"module": autoencoder.build().state_dict()}, tmp_path / "autoencoder.pt")
    np.save(
        tmp_path / "scenes.npy", np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)
    )
    flow_autoencoder.train(tmp_path, steps=3)
    vae = flow_autoencoder.load(tmp_path)
    vae.save_pretrained(tmp_path / "shipped")
    assert str(tmp_path) not in (tmp_path / "shipped/config.json").read_text()
    latents = flow_autoencoder.encode_all(tmp_path, vae)
    assert latents.shape == (20, 8, 8, 8) and latents.dtype == np.float32
    assert latents.std() == pytest.approx(1, abs=0.05) and latents.mean() == pytest.approx(0, abs=0.05)
    # the decoder was trained on these latents, the encoder was frozen
    with torch.no_grad():
        again = vae.encode(autoencoder.to_tensor(np.load(tmp_path / "scenes.npy"))).latent_dist.mean
    torch.testing.assert_close(to_denoiser(vae, again), torch.from_numpy(latents), atol=5e-3, rtol=0)
    states = {
        name: torch.load(tmp_path / f"{name}.pt", weights_only=True)["module"]
        for name in ("flow_autoencoder", "flow_decoder")
    }
    assert not torch.equal(
        states["flow_decoder"]["decoder.conv_out.weight"],
        states["flow_autoencoder"]["decoder.conv_out.weight"],
    )

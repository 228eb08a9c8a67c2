"""Whitening changes the latents' scale and nothing else; widening keeps what was learned."""

import torch

from capo.shapes.make.autoencoder import SHIPPED, build, load, whitened, widened


def test_whitened_latents_have_unit_variance_and_the_same_pictures():
    torch.manual_seed(0)
    vae, pictures = build().eval(), torch.rand(20, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        before = vae.encode(pictures).latent_dist
        picture, deviation = vae.decode(before.mean).sample, before.std
        scale = before.mean.std((0, 2, 3))
        whitened(vae, pictures)
        after = vae.encode(pictures).latent_dist
        assert torch.allclose(after.mean.mean((0, 2, 3)), torch.zeros(8), atol=1e-4)
        assert torch.allclose(after.mean.std((0, 2, 3)), torch.ones(8), atol=1e-4)
        assert torch.allclose(after.std, deviation / scale[:, None, None], rtol=1e-3)
        assert torch.allclose(vae.decode(after.mean).sample, picture, atol=1e-3)


def test_widened_keeps_the_weights_of_the_narrow_one():
    torch.manual_seed(0)
    narrow = build(4)
    wide = widened(narrow)
    assert torch.equal(wide.decoder.conv_in.weight[:, :4], narrow.decoder.conv_in.weight)
    assert torch.equal(wide.quant_conv.weight[8:12, 8:12], narrow.quant_conv.weight[4:, 4:])  # log variances
    assert torch.equal(wide.decoder.conv_out.weight, narrow.decoder.conv_out.weight)


def test_without_one_of_its_own_a_folder_has_the_shipped_autoencoder(tmp_path):
    vae = load(tmp_path)
    assert "_name_or_path" not in vae.config or not vae.config["_name_or_path"]  # it would ship
    stored = type(vae).from_pretrained(SHIPPED, torch_dtype=torch.float32).state_dict()
    assert (
        all(torch.equal(value, stored[name]) for name, value in vae.state_dict().items()) and not vae.training
    )
    assert next(vae.parameters()).dtype == torch.float32
    vae.save_pretrained(tmp_path / "shipped")
    assert "_name_or_path" not in (tmp_path / "shipped" / "config.json").read_text()

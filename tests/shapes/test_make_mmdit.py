from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from capo.config import _shipped
from capo.shapes.make import autoencoder, mmdit
from capo.shapes.make.fitting import generator


def test_a_narrowed_autoencoder_is_the_same_one_inside():
    torch.manual_seed(0)
    vae = autoencoder.build().eval()
    with torch.no_grad():
        vae.post_quant_conv.weight[:, [1, 3, 4, 6]] = 0  # channels that the decoder does not read
        vae.post_quant_conv.bias.uniform_(-0.5, 0.5)
        slim, kept = autoencoder.narrowed(vae)
        assert kept == [0, 2, 5, 7] and slim.config.latent_channels == 4
        assert not slim.config.use_quant_conv and not slim.config.use_post_quant_conv
        pictures = torch.rand(2, 3, 64, 64) * 2 - 1
        before, after = vae.encode(pictures).latent_dist, slim.encode(pictures).latent_dist
        # what the denoiser sees is what it saw before, of the channels that are kept
        seen = (after.mean - slim.config.shift_factor) * slim.config.scaling_factor
        torch.testing.assert_close(seen, before.mean[:, kept], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(after.std * slim.config.scaling_factor, before.std[:, kept], atol=1e-4, rtol=1e-4)
        # what the decoder's first convolution makes of it is the same but at the border, where zeros are padded before the bias
        one = vae.decoder.conv_in(vae.post_quant_conv(before.mean))
        other = slim.decoder.conv_in(after.mean)
        torch.testing.assert_close(other[..., 1:-1, 1:-1], one[..., 1:-1, 1:-1], atol=1e-4, rtol=1e-4)
        assert (other - one)[..., 0, :].abs().max() > 1e-3


def test_times_are_a_quarter_uniform_and_logit_normal_around_a_quarter():
    drawn = torch.cat([mmdit.times(32, generator(0, 3, step)) for step in range(200)])
    assert 0 < drawn.min() and drawn.max() < 1
    # stratified in random order: the mean of a uniform time is 1/2, of logit the mixture of 0 (uniform) and 0.25
    assert torch.logit(drawn).mean().item() == pytest.approx(0.75 * 0.25, abs=0.05)
    first = mmdit.times(32, generator(0, 3, 0))
    assert torch.equal(first, mmdit.times(32, generator(0, 3, 0)))


def test_the_learner_is_fed_what_the_pipeline_feeds():
    learner = mmdit.Learner(Path(_shipped("unet"))).eval()
    slim, _ = autoencoder.narrowed(autoencoder.build())
    pipe = mmdit.pipeline(learner, slim)
    captions = ["a red circle", "", "two blue stars on a white background"]
    with torch.no_grad():
        words, pooled = learner.conditioning(learner.tokens(captions))
        told = pipe.encode_prompt(captions, None, None, do_classifier_free_guidance=False, max_sequence_length=mmdit.T5_TOKENS)
    assert torch.allclose(words, told[0], atol=1e-6) and torch.allclose(pooled, told[2], atol=1e-6)
    assert words.shape == (3, 20 + mmdit.T5_TOKENS, mmdit.CONTEXT) and pooled.shape == (3, 128)


def test_the_encoders_begin_as_the_unets():
    learner = mmdit.Learner(Path(_shipped("unet")))
    stored = load_file(f"{_shipped('unet')}/text_encoder_2/model.safetensors")
    own = learner.second.state_dict()
    shared = [name for name in stored if name in own]
    assert shared and all(np.array_equal(own[name].numpy(), stored[name].float().numpy()) for name in shared)


def test_the_heads_that_look_at_a_neighbour_do_so_before_the_first_step():
    torch.manual_seed(0)
    transformer = mmdit.build_transformer()
    mmdit.prepare(transformer)
    tokens = F.layer_norm(transformer.pos_embed.pos_embed[0], (128,))
    for block, offsets in zip(transformer.transformer_blocks, mmdit.LOOKS, strict=True):
        queries, keys = (project(tokens).view(64, 8, 16) for project in (block.attn.to_q, block.attn.to_k))
        for head, (right, down) in enumerate(offsets):
            attention = (queries[:, head] @ keys[:, head].T / 4).softmax(-1)
            middle = [row * 8 + column for row in range(2, 6) for column in range(2, 6)]
            assert attention[middle].argmax(-1).tolist() == [place + 8 * down + right for place in middle]
            assert attention[middle].max(-1).values.min() > 0.3


def test_a_prepared_denoiser_begins_by_saying_nothing_and_learns_from_there():
    torch.manual_seed(0)
    transformer = mmdit.build_transformer()
    mmdit.prepare(transformer)
    seen = (torch.randn(2, 4, 16, 16), torch.randn(2, 24, mmdit.CONTEXT), torch.randn(2, 128), torch.tensor([3.0, 500.0]))
    told = transformer(*seen).sample
    assert not told.any()
    told.sub(1).square().mean().backward()
    assert transformer.proj_out.weight.grad is not None and transformer.proj_out.bias.grad.abs().max() > 0

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from capo.cli.resolvers import shipped
from capo.shapes.make import flow_autoencoder, mmdit
from capo.shapes.make.fitting import generator
from capo.shapes.make.text import token_ids


def test_times_are_a_quarter_uniform_and_logit_normal_around_a_quarter():
    drawn = torch.cat([mmdit.times(32, generator(0, 3, step)) for step in range(200)])
    assert drawn.min() > 0 and drawn.max() < 1
    # logits have mean 0 for the uniform quarter and 0.25 for the rest
    assert torch.logit(drawn).mean().item() == pytest.approx(0.75 * 0.25, abs=0.05)
    first = mmdit.times(32, generator(0, 3, 0))
    assert torch.equal(first, mmdit.times(32, generator(0, 3, 0)))


def test_the_learner_is_fed_what_the_pipeline_feeds():
    learner = mmdit.Learner(Path(shipped("unet"))).eval()
    pipe = mmdit.pipeline(learner, flow_autoencoder.build())
    captions = ["a red circle", "", "two blue stars on a white background"]
    with torch.no_grad():
        words, pooled = learner.conditioning(token_ids(learner.tokenizer, captions))
        told = pipe.encode_prompt(
            captions, None, None, do_classifier_free_guidance=False, max_sequence_length=mmdit.T5_TOKENS
        )
    assert torch.allclose(words, told[0], atol=1e-6) and torch.allclose(pooled, told[2], atol=1e-6)
    assert words.shape == (3, 20 + mmdit.T5_TOKENS, mmdit.CONTEXT) and pooled.shape == (3, 128)


def test_the_encoders_begin_as_the_unets():
    learner = mmdit.Learner(Path(shipped("unet")))
    stored = load_file(f"{shipped('unet')}/text_encoder_2/model.safetensors")
    own = learner.second.state_dict()
    shared = [name for name in stored if name in own]
    assert shared and all(np.array_equal(own[name].numpy(), stored[name].float().numpy()) for name in shared)


def test_a_refitted_map_makes_the_same_of_other_encodings():
    draw = generator(0, 1)
    layer, old = torch.nn.Linear(6, 3), torch.randn(50, 6, generator=draw)
    told = layer(old).detach()
    new = old @ torch.randn(6, 6, generator=draw) + 1
    with torch.no_grad():
        mmdit.refit(layer, old, new)
    assert torch.allclose(layer(new), told, atol=1e-3)


def test_a_learner_begins_as_a_pipeline_with_text_encoders_of_its_own(tmp_path):
    torch.manual_seed(0)
    pipe = mmdit.pipeline(mmdit.Learner(Path(shipped("unet"))), flow_autoencoder.build())
    for weights in pipe.text_encoder_2.parameters():
        weights.mul_(1 + 0.1 * torch.randn(weights.shape))
    pipe.save_pretrained(tmp_path)
    learner = mmdit.Learner(Path(shipped("unet")))
    captions = ["a red circle", "", "two blue stars on a white background", "a small green ring"]
    mmdit.begin(learner, tmp_path, captions)
    assert torch.equal(learner.first.text_projection.weight, pipe.text_encoder.text_projection.weight)
    before, after = pipe.transformer.state_dict(), learner.transformer.state_dict()
    refitted = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.rsplit(".", 1)[0] for name in refitted} == {
        "context_embedder",
        "time_text_embed.text_embedder.linear_1",
    }
    ids = token_ids(learner.tokenizer, captions)
    with torch.no_grad():
        words, _ = mmdit.conditioning(ids, (pipe.text_encoder, pipe.text_encoder_2))
        wanted = pipe.transformer.context_embedder(words)
        found = learner.transformer.context_embedder(learner.conditioning(ids)[0])
        kept = pipe.transformer.context_embedder(learner.conditioning(ids)[0])
    assert (found - wanted).square().mean() < 0.05 * (kept - wanted).square().mean()


def test_without_an_autoencoder_of_its_own_a_folder_has_the_shipped_one(tmp_path):
    stored = load_file(f"{shipped('mmdit')}/vae/diffusion_pytorch_model.safetensors")
    own = flow_autoencoder.load(tmp_path).state_dict()
    assert all(np.array_equal(own[name].numpy(), stored[name].float().numpy()) for name in stored)


def test_the_heads_that_look_at_a_neighbor_do_so_before_the_first_step():
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
    seen = (
        torch.randn(2, 8, 8, 8),
        torch.randn(2, 24, mmdit.CONTEXT),
        torch.randn(2, 128),
        torch.tensor([3.0, 500.0]),
    )
    told = transformer(*seen).sample
    assert not told.any()
    told.sub(1).square().mean().backward()
    assert transformer.proj_out.weight.grad is not None and transformer.proj_out.bias.grad.abs().max() > 0


def test_the_teller_reads_the_pictures_tokens_behind_the_second_block():
    learner = mmdit.Learner(Path(shipped("unet")))
    mmdit.prepare(learner.transformer)
    given = []
    learner.transformer.transformer_blocks[2].register_forward_pre_hook(
        lambda block, args, kwargs: given.append(kwargs), with_kwargs=True
    )
    learner.transformer(
        torch.randn(2, 8, 8, 8),
        torch.randn(2, 24, mmdit.CONTEXT),
        torch.randn(2, 128),
        torch.tensor([3.0, 500.0]),
    )
    assert torch.equal(learner.seen, given[0]["hidden_states"]) and learner.seen.shape == (2, 64, 128)

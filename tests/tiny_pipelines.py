"""Tiny pipelines of the real classes: everything that the published ones have, at a size that a test can afford."""

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

WORDS = ("a", "and", "blue", "circle", "green", "left", "of", "red", "square", "the", "triangle")
CONTEXT = 12  # tokens a prompt; CLIP has 77
# how a run takes the tiny pipeline of that name, beside its folder: as the published model with what is smaller said
CONFIGURED = {
    "sdxl": ("model=sdxl", "model.backbone.revision=null", "model.backbone.variant=null"),
    "sd15": ("model=sd15", "model.backbone.revision=null", "model.backbone.variant=null"),
    "sd3": ("model=sd3", "model.backbone.revision=null", "model.backbone.sequence_length=9"),
    "sd3_bare": ("model=sd3", "model.backbone.revision=null", "model.backbone.t5=false", "model.backbone.sequence_length=3"),
}


def tiny_tokenizer() -> CLIPTokenizer:
    """Byte-pair tokenizer in which each word of WORDS is one token: every prefix of a word is a token too."""
    pieces, merges = dict.fromkeys(c + end for c in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")), {}
    for word in sorted(WORDS, key=len, reverse=True):
        for end in range(2, len(word) + 1):
            last = word[end - 1] + ("</w>" if end == len(word) else "")
            merges[word[: end - 1], last] = None
            pieces[word[: end - 1] + last] = None
    vocabulary = {piece: index for index, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=list(merges), model_max_length=CONTEXT)


def tiny_text_config(tokenizer: CLIPTokenizer, width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def tiny_unet() -> UNet2DConditionModel:
    """SDXL's conditioning (two text encoders of widths 8 and 16, text_time) on 4x8x8 latents."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=2,
        use_linear_projection=True,
        cross_attention_dim=8 + 16,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=16 + 6 * 4,
    )


def tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        scaling_factor=0.7,
        mid_block_add_attention=False,
    )


def build_tiny_pipeline(force_zeros_for_empty_prompt: bool = True) -> StableDiffusionXLPipeline:
    """Random weights from seed 0; 16x16 images, 4x8x8 latents."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = tiny_tokenizer()
        pipeline = StableDiffusionXLPipeline(
            vae=tiny_vae(),
            unet=tiny_unet(),
            text_encoder=CLIPTextModel(tiny_text_config(tokenizer, 8)),
            text_encoder_2=CLIPTextModelWithProjection(tiny_text_config(tokenizer, 16)),
            tokenizer=tokenizer,
            tokenizer_2=tiny_tokenizer(),
            scheduler=DDIMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                clip_sample=False,
                set_alpha_to_one=False,
                steps_offset=1,
            ),
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
            add_watermarker=False,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_tiny_sd15() -> StableDiffusionPipeline:
    """SD1.5's conditioning (one text encoder) and scheduler class; no safety checker."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        tokenizer = tiny_tokenizer()
        unet = UNet2DConditionModel(
            sample_size=8, layers_per_block=1, block_out_channels=(8, 16), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), norm_num_groups=4, attention_head_dim=2, cross_attention_dim=8,
        )  # fmt: skip
        pipeline = StableDiffusionPipeline(
            vae=tiny_vae(), unet=unet, text_encoder=CLIPTextModel(tiny_text_config(tokenizer, 8)), tokenizer=tokenizer,
            scheduler=PNDMScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False
            ),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_t5_tokenizer() -> T5TokenizerFast:
    """A unigram tokenizer in which each word of WORDS is one token."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"\u2581{word}", -1.0) for word in WORDS), ("\u2581", -2.0)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0)


def build_tiny_sd3(t5: bool = True) -> StableDiffusion3Pipeline:
    """SD3's classes: joint blocks on 16 channels, a shifted VAE without 1 x 1 convolutions, two CLIPs, with or without a T5."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        tokenizer, words = tiny_tokenizer(), tiny_t5_tokenizer() if t5 else None
        third = T5EncoderModel(T5Config(
            vocab_size=len(words), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
        )) if t5 else None  # fmt: skip
        transformer = SD3Transformer2DModel(
            sample_size=8, num_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16,
            pooled_projection_dim=8 + 16, pos_embed_max_size=8,
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4, latent_channels=16, sample_size=16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False,
            use_post_quant_conv=False, mid_block_add_attention=False,
        )  # fmt: skip
        encoders = [CLIPTextModelWithProjection(tiny_text_config(tokenizer, width)) for width in (8, 16)]
        pipeline = StableDiffusion3Pipeline(
            transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae, text_encoder=encoders[0],
            tokenizer=tokenizer, text_encoder_2=encoders[1], tokenizer_2=tiny_tokenizer(), text_encoder_3=third, tokenizer_3=words,
        )  # fmt: skip
    for part in (vae, transformer, third, *encoders):
        if part is not None:
            part.eval()  # T5 has dropout
    pipeline.set_progress_bar_config(disable=True)
    return pipeline

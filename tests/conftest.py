"""A tiny pipeline of the real classes: everything that SDXL has, at a size that a test can afford."""

import os
import sys

os.environ.setdefault(
    "HF_HUB_OFFLINE", "1"
)  # read when huggingface_hub is imported: no test may reach the network

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from capo.backbones import UNetBackbone

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the three scripts

WORDS = ("a", "and", "blue", "circle", "green", "left", "of", "red", "square", "the", "triangle")
CONTEXT = 12  # tokens a prompt; CLIP has 77
torch.set_num_threads(1)


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


@pytest.fixture(scope="session")
def build_tiny():
    """The function that builds a tiny pipeline, for tests that need another variety of it."""
    return build_tiny_pipeline


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """Folder of the tiny pipeline, as save_pretrained writes it. Read only: copy it to change it."""
    folder = tmp_path_factory.mktemp("tiny") / "pipeline"
    build_tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_backbone(tiny_folder) -> UNetBackbone:
    """The tiny pipeline behind the backbone interface. Read only: train a `trainable_copy()` of it."""
    return UNetBackbone(str(tiny_folder), name="tiny")


RUN_PROMPTS = {"train": "a red cat\na blue dog\na red dog\na blue cat\n", "validation": "red cat\nblue dog\n", "test": "cat\ndog\n"}


def brightness(channel: int) -> dict:
    return {"scorer": {"_target_": "fake_rewards.Brightness", "channel": channel}, "scale": 20.0}


@pytest.fixture(scope="module")
def tiny_run(tiny_folder, tmp_path_factory):
    """Makes the configuration of a run on the tiny pipeline; all share one pool root."""
    folder = tmp_path_factory.mktemp("runs")
    for split, text in RUN_PROMPTS.items():
        (folder / f"{split}.txt").write_text(text)

    def make(name: str, *overrides: str, config: str = "train", rewards: int = 2):
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            cfg = compose(config, overrides=[
                f"run_dir={folder / name}", f"model.backbone.weights={tiny_folder}", f"pool.root={folder / 'pools'}", "prompts=text",
                *(f"prompts.{split}={folder / split}.txt" for split in RUN_PROMPTS), "pool.candidates=4", "sampling.steps=2",
                "trainer.max_steps=2", "trainer.batch=2", "trainer.log_every=1", "validation.every=2", "validation.images=2",
                "evaluation.images=2", "evaluation.zero_prompts=2", "evaluation.oracle=null", "threads=1", "model.name=tiny", *overrides,
            ])  # fmt: skip
        scorers = {name: brightness(channel) for channel, name in enumerate(("r", "g", "b")[:rewards])}
        OmegaConf.update(cfg, "rewards", scorers, merge=False)
        OmegaConf.update(cfg, "evaluation.rewards", {"r": brightness(0)}, merge=False)
        return cfg

    make.folder = folder
    return make


@pytest.fixture(scope="module")
def command_line(tiny_run, tiny_folder, tmp_path_factory):
    """Arguments that make the entry scripts run on the tiny pipeline, pools in the root of `tiny_run`'s."""
    groups = tmp_path_factory.mktemp("groups")
    (groups / "rewards").mkdir()
    OmegaConf.save({"r": brightness(0), "g": brightness(1)}, groups / "rewards" / "fake.yaml")
    values = {
        "hydra.searchpath": f"[file://{groups}]", "rewards": "fake", "rewards@evaluation.rewards": "fake", "model.name": "tiny",
        "model.backbone.weights": tiny_folder, "pool.root": tiny_run.folder / "pools", "prompts": "text",
        **{f"prompts.{split}": tiny_run.folder / f"{split}.txt" for split in RUN_PROMPTS},
        "pool.candidates": 4, "sampling.steps": 2, "trainer.max_steps": 2, "trainer.batch": 2, "trainer.log_every": 1,
        "validation.every": 1, "validation.images": 2, "evaluation.images": 2, "evaluation.zero_prompts": 2,
        "evaluation.oracle": "null", "threads": 1,
    }  # fmt: skip
    return [f"{key}={value}" for key, value in values.items()]


@pytest.fixture
def typed(command_line, monkeypatch):
    """Calls an entry script's `main` as if `python SCRIPT *arguments` had been typed, on the tiny pipeline."""

    def call(script, *arguments: str) -> None:
        flags = [argument for argument in arguments if argument.startswith("-")]
        values = [argument for argument in arguments if argument not in flags]
        monkeypatch.setattr(sys, "argv", [script.__file__, "--config-path", str(ROOT / "conf"), *flags, *command_line, *values])
        script.main()

    return call

"""Configurations of a model's folder that libraries would read unchecked."""

import json

import pytest

from capo.backbones.component_configs import check_configs
from capo.errors import DamagedFile


@pytest.mark.parametrize(("name", "key", "value", "told"), [
    ("config.json", "scaling_factor", "x", "scaling_factor=x: must be a finite number above 0"),
    ("config.json", "scaling_factor", None, "scaling_factor=null: must be a finite number above 0"),
    ("config.json", "scaling_factor", 0, "scaling_factor=0: must be a finite number above 0"),
    ("config.json", "scaling_factor", float("nan"), "scaling_factor=nan: must be a finite number above 0"),
    ("config.json", "sample_size", -4, "sample_size=-4: must be a whole number from 1 on, or two of them"),
    ("config.json", "sample_size", 8.5, "sample_size=8.5: must be a whole number from 1 on, or two of them"),
    ("config.json", "sample_size", None, "sample_size=null: must be a whole number"),
    ("config.json", "addition_time_embed_dim", "x", "addition_time_embed_dim=x: must be a whole number"),
    ("config.json", "block_out_channels", [32, 10**9], "block_out_channels=[32, 1000000000]: must be"),
    ("config.json", "layers_per_block", "2", "layers_per_block=2: must be a whole number from 1 to 1024, a"),
    ("config.json", "scaling_factor", 1e300, "scaling_factor=1e+300: must be a finite number above 0"),
    ("config.json", "norm_eps", "x", "norm_eps=x: must be"),
    ("config.json", "freq_shift", "x", "freq_shift=x: must be"),
    ("config.json", "transformer_layers_per_block", 10**9, "transformer_layers_per_block=1000000000: must"),
    ("config.json", "latents_mean", "abc", "latents_mean=abc: must be a list of a number for each channel"),
    ("config.json", "latents_std", [1.0, 0.0], "latents_std=[1.0, 0.0]: must be a list of a number above 0"),
    ("scheduler_config.json", "shift", 0, "shift=0: must be"),
    ("scheduler_config.json", "beta_start", None, "beta_start=null: must be"),
    ("scheduler_config.json", "steps_offset", "x", "steps_offset=x: must be a whole number"),
    ("scheduler_config.json", "num_train_timesteps", "1000", "num_train_timesteps=1000: must be a whole"),
    ("tokenizer_config.json", "model_max_length", "x", "model_max_length=x: must be a number of tokens"),
    ("tokenizer_config.json", "model_max_length", 0, "model_max_length=0: must be a number of tokens"),
])  # fmt: skip
def test_a_value_that_ends_in_a_trace_later_is_named_with_its_file(tmp_path, name, key, value, told):
    (tmp_path / name).write_text(json.dumps({"_class_name": "AutoencoderKL", key: value}))
    with pytest.raises(DamagedFile) as refused:
        check_configs(tmp_path)
    assert f"{tmp_path / name} cannot be read ({told}" in str(refused.value)
    assert str(refused.value).endswith("get the model's folder again")


@pytest.mark.parametrize(("key", "value"), [
    ("hidden_size", -64), ("num_hidden_layers", "2"), ("d_model", 10**9), ("vocab_size", None),
])  # fmt: skip
def test_a_size_that_no_text_encoder_has_is_named(tmp_path, key, value):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["CLIPTextModel"], key: value}))
    with pytest.raises(DamagedFile, match=rf"config.json cannot be read \({key}=.*: must be a whole number"):
        check_configs(tmp_path)


@pytest.mark.parametrize("values", [
    {"_class_name": "UNet2DConditionModel", "attention_head_dim": [5, 10], "num_attention_heads": None},
    {"architectures": ["T5EncoderModel"], "d_model": 4096, "vocab_size": 32128, "num_layers": 24},
    {"_class_name": "UNet2DConditionModel", "sample_size": [64, 96], "addition_time_embed_dim": None},
    {"_class_name": "AutoencoderKL", "scaling_factor": 1, "shift_factor": None, "sample_size": 1024},
    {"architectures": ["CLIPTextModel"], "sample_size": "of something else"},
])  # fmt: skip
def test_what_libraries_write_passes(tmp_path, values):
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 1000000000000000019884624838656}')
    check_configs(tmp_path)
    wrong = {"sample_size": 0} if "_class_name" in values else {"vocab_size": 0}
    (tmp_path / "config.json").write_text(json.dumps(values | wrong))
    with pytest.raises(DamagedFile, match=f"{next(iter(wrong))}=0"):
        check_configs(tmp_path)

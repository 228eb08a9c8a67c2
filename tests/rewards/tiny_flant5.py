"""A CLIP-FlanT5 that a test can afford, in folders as the published ones lie: checkpoint, tokenizer, vision tower."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_clip import SIDE, build_clip
from torch import Tensor
from transformers import CLIPModel, T5Config, T5ForConditionalGeneration, T5Tokenizer

WIDTH, TOWER_WIDTH, FILLING = 16, 12, 5  # FILLING: rows of T5's table of words beyond its tokens
WORDS = [
    "A", "chat", "between", "USER:", "ASSISTANT:", "Does", "this", "figure", "show", "Please", "answer", "yes",
    "or", "no.", "Yes", "No", "red", "square", "circle", "the", "of",
]  # fmt: skip


@dataclass
class Folders:
    """weights, tokenizer and tower lie in these; `state` is the checkpoint by its published names, `tokens` what can be answered."""

    weights: Path
    tokenizer: Path
    tower: Path
    state: dict[str, Tensor]
    tokens: int

    def arguments(self) -> dict[str, str]:
        """As the scorer takes them."""
        return {name: str(getattr(self, name)) for name in ("weights", "tokenizer", "tower")}


def build_flant5(root: Path, nested_tower: bool = False) -> Folders:
    """Random weights large enough that images and prompts matter; in two files with an index, as torch.save writes them."""
    tokenizer = tiny_t5_tokenizer()
    tokenizer.save_pretrained(root / "words")
    state = published_state(len(tokenizer) + FILLING)
    clip = tiny_tower(root / "tower")
    if nested_tower:  # moved a little, so that it is not the folder's
        state |= {f"vision_tower.vision_tower.{name}": value + 0.05 for name, value in clip.state_dict().items() if "vision_model." in name}
    (root / "weights").mkdir()
    config = {
        "model_type": "clip_t5", "architectures": ["CLIPT5ForConditionalGeneration"], "torch_dtype": "bfloat16", "n_positions": 512,
        "mm_hidden_size": TOWER_WIDTH, "mm_projector_type": "mlp2x_gelu", "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2, "mm_vision_tower": "openai/clip-vit-large-patch14-336", "use_mm_proj": True,
        "image_aspect_ratio": "pad", "output_past": True, "transformers_version": "4.31.0", **t5_values(len(tokenizer) + FILLING),
    }  # fmt: skip
    (root / "weights" / "config.json").write_text(json.dumps(config))
    write_files(root / "weights", state)
    return Folders(root / "weights", root / "words", root / "tower", state, len(tokenizer))


def t5_values(vocabulary: int) -> dict:
    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2, "vocab_size": vocabulary}
    return sizes | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "pad_token_id": 0, "eos_token_id": 1,
                    "decoder_start_token_id": 0, "dropout_rate": 0.1, "relative_attention_max_distance": 32}  # fmt: skip


def tiny_t5_tokenizer() -> T5Tokenizer:
    """Unigram pieces: a few whole words, every letter; what T5's own has, ids of padding, end and unknown included."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [(f"▁{word}", -2.0) for word in WORDS]
    letters = [chr(code) for code in range(33, 127)]
    return T5Tokenizer(vocab=pieces + [(letter, -6.0) for letter in letters], extra_ids=2)


def published_state(vocabulary: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    t5 = T5ForConditionalGeneration(T5Config(**t5_values(vocabulary)))
    state = {name: 0.4 * torch.randn_like(value) for name, value in t5.state_dict().items() if "norm" not in name}
    state |= {name: 1 + 0.2 * torch.randn_like(value) for name, value in t5.state_dict().items() if "norm" in name}
    words = torch.randn(vocabulary, WIDTH)
    aliases = ("shared", "encoder.embed_tokens", "decoder.embed_tokens", "embed_tokens")
    state |= {f"{alias}.weight": words for alias in aliases} | {"lm_head.weight": 0.3 * torch.randn(vocabulary, WIDTH)}
    state["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.zeros(32, 2)  # of old files
    shapes = {"0.weight": (WIDTH, TOWER_WIDTH), "0.bias": (WIDTH,), "2.weight": (WIDTH, WIDTH), "2.bias": (WIDTH,)}
    return state | {f"mm_projector.{name}": 0.5 * torch.randn(shape) for name, shape in shapes.items()}


def tiny_tower(folder: Path) -> CLIPModel:
    """A whole CLIP with its published image processor's old file and its weights as tensors that torch.save wrote."""
    clip = build_clip(folder, seed=3)
    (folder / "model.safetensors").unlink()
    torch.save(clip.state_dict(), folder / "pytorch_model.bin")
    mean, deviation = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    (folder / "preprocessor_config.json").write_text(json.dumps({
        "crop_size": SIDE, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3, "size": SIDE,
        "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": mean, "image_std": deviation}))  # fmt: skip
    return clip


def write_files(folder: Path, state: dict[str, Tensor], form: str = "bin") -> None:
    """Two files and their index (forms bin and safetensors), or one file of safetensors without (form one)."""
    for file in folder.iterdir():
        if file.name != "config.json":
            file.unlink()
    own = {name: value.clone() for name, value in state.items()}
    if form == "one":
        return save_file(own, folder / "model.safetensors")
    stem = "pytorch_model" if form == "bin" else "model"
    save, where, names = (torch.save if form == "bin" else save_file), {}, sorted(own)
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"{stem}-{number:05d}-of-00002.{form}"
        save({name: own[name] for name in part}, folder / file)
        where |= dict.fromkeys(part, file)
    (folder / f"{stem}.{form}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return None

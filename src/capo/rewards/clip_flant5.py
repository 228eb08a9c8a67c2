"""CLIP-FlanT5, a T5 whose encoder reads image patches among words, and the loading of its published files.

Architecture and tensor names are those of Lin et al., Evaluating Text-to-Visual Generation with Image-to-Text
Generation, 2024.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from capo.errors import InputError
from capo.rewards.clip_scores import MODEL_FILES
from capo.rewards.weights import read_config, read_state, refuse_other_names
from capo.runtime.weight_files import weight_map

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig, T5Config

PUBLISHED = "zhiqiulin/clip-flant5-xxl"
LAYER = -2  # index into the tower's hidden states: the output of the layer before the last
ARCHITECTURE = {
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": LAYER,
    "mm_vision_select_feature": "patch",
}
UNREAD = "EncDecAttention.relative_attention_bias.weight"  # in old T5 files, and used by no T5


class ClipFlanT5(nn.Module):
    """Network from an image and a question to the log-probabilities of an answer's tokens.

    Args:
        t5: architecture of the T5.
        tower: architecture of the CLIP vision tower.
        vocabulary: number of tokens, the first of T5's table, over which probabilities are normalized.
    """

    def __init__(self, t5: T5Config, tower: CLIPVisionConfig, vocabulary: int):
        from transformers import CLIPVisionModel, T5ForConditionalGeneration

        super().__init__()
        self.t5 = T5ForConditionalGeneration(t5)
        # Encoder and decoder share one embedding table; the output head has its own.
        self.t5.set_input_embeddings(self.t5.shared)
        self.vision_tower = CLIPVisionModel(tower)
        self.mm_projector = nn.Sequential(
            nn.Linear(tower.hidden_size, t5.d_model), nn.GELU(), nn.Linear(t5.d_model, t5.d_model)
        )
        self.vocabulary = vocabulary

    def forward(self, pixels: Tensor, before: Tensor, after: Tensor, answer: Tensor) -> Tensor:
        """Return log-probabilities (B, A), float32, of the tokens `answer`, each given those before it.

        Args:
            pixels: normalized images (B, 3, H, W).
            before: the question's tokens before the image (N,), the same for all images.
            after: the question's tokens after the image (B, M), padded at the end.
            answer: tokens of the answer (A,).
        """
        image, padding = self.look(pixels), self.t5.config.pad_token_id
        assert padding is not None  # a T5 has one
        words = self.t5.shared
        read = torch.cat([words(before).expand(len(after), -1, -1), image, words(after)], dim=1)
        mask = torch.cat(
            [
                torch.ones(read.shape[0], read.shape[1] - after.shape[1], device=after.device),
                after != padding,
            ],
            dim=1,
        )
        # T5's decoder starts with the padding token.
        written = torch.cat([answer.new_full((1,), padding), answer[:-1]])
        logits = self.t5(
            inputs_embeds=read,
            attention_mask=mask,
            decoder_input_ids=written.expand(len(after), -1),
            use_cache=False,
        ).logits
        return (
            logits[..., : self.vocabulary]
            .float()
            .log_softmax(-1)
            .gather(-1, answer.expand(len(after), -1)[..., None])[..., 0]
        )

    def look(self, pixels: Tensor) -> Tensor:
        """Embed pixels (B, 3, H, W) as patches (B, (H / patch)^2, width of T5), without the class token."""
        seen = self.vision_tower(
            pixel_values=pixels.to(self.t5.dtype), output_hidden_states=True
        ).hidden_states[LAYER]
        return self.mm_projector(seen[:, 1:])


def t5_config(folder: Path, setting: str) -> T5Config:
    """Read the T5's architecture from a folder's config.json.

    Raises InputError if the file is missing or describes another model than a CLIP-FlanT5.
    """
    from transformers import T5Config

    found = read_config(folder, setting)
    if "d_kv" not in found:
        raise InputError(
            f"{setting}={folder}: it holds a model of type {found.get('model_type')}, this reward reads a "
            f"CLIP-FlanT5 such as {PUBLISHED}"
        )
    for key, value in ARCHITECTURE.items():
        if found.get(key, value) != value:
            raise InputError(
                f"{setting}={folder}: its {key} is {found[key]}, this reward reads {value}, as in {PUBLISHED}"
            )
    own = ("model_type", "architectures", "dtype", "torch_dtype", "transformers_version")
    # The config's tie_word_embeddings is kept: transformers 5 uses it for the output's scale alone.
    return T5Config(
        **{key: value for key, value in found.items() if key not in own and not key.startswith("mm_")}
    )


def weight_files(folder: Path, setting: str) -> list[Path]:
    """List the files of a checkpoint, safetensors if there are any.

    Raises InputError if a file that the checkpoint's index names is missing.
    """
    names = sorted(set(_index(folder).values())) or [file.name for file in _first_format(folder)][:1]
    if lacking := [name for name in names if not (folder / name).is_file()]:
        raise InputError(
            f"{setting}={folder}: {', '.join(lacking)} of its index {'is' if len(lacking) == 1 else 'are'} "
            "not there; get the folder again"
        )
    return [folder / name for name in names]


def holds_tower(folder: Path) -> bool:
    """Whether the index of a checkpoint lists the vision tower's weights."""
    return any("vision_tower." in name for name in _index(folder))


def _index(folder: Path) -> Mapping[str, str]:
    """Read {tensor: file} of a checkpoint in several files; empty for a checkpoint in one file."""
    name = (
        "model.safetensors.index.json"
        if _first_format(folder)[0].suffix == ".safetensors"
        else "pytorch_model.bin.index.json"
    )
    if not (folder / name).is_file():
        return {}
    return weight_map(folder / name)


def _first_format(folder: Path) -> list[Path]:
    """List the weight files of the first format that has any.

    A hub snapshot holds the index files of all formats, but the weight files of one.
    """
    return next(found for pattern in MODEL_FILES if (found := sorted(folder.glob(pattern))))


def load_clip_flant5(
    network: ClipFlanT5, files: Iterable[Path], tower: Iterable[Path], dtype: torch.dtype, setting: str
) -> None:
    """Load a checkpoint's files, one after another, into a network on the meta device, in `dtype`.

    Args:
        network: the network to fill.
        files: files of the checkpoint.
        tower: files of a CLIP, for a checkpoint without a vision tower.
        dtype: dtype of the loaded weights.
        setting: key of the configuration that gave the source, for messages.

    Raises:
        InputError: the weights do not fit the network.
    """
    wanted = {name for name in network.state_dict() if not name.endswith("embed_tokens.weight")}
    seen: set[str] = set()
    source = ""
    for state, source in _states(files, tower, setting):
        try:
            network.load_state_dict(
                {name: _cast(value, dtype) for name, value in state.items() if name in wanted}, False, True
            )
        except RuntimeError as error:  # shapes that do not match
            raise InputError(
                f"{setting}={source}: {error}; this reward reads the weights of {PUBLISHED}"
            ) from error
        seen |= set(state)
    refuse_other_names(wanted - seen, seen - wanted, source, setting, PUBLISHED)
    embeddings = network.vision_tower.embeddings
    embeddings.register_buffer("position_ids", torch.arange(embeddings.num_positions)[None], persistent=False)


def _states(
    files: Iterable[Path], tower: Iterable[Path], setting: str
) -> Iterator[tuple[dict[str, Tensor], str]]:
    """Yield each file's tensors, under the network's names, and the file's path.

    The tower's files come first, so that a tower in the checkpoint itself overrides them.
    """
    for file in tower:
        state = {
            name: value
            for name, value in read_state(file, setting).items()
            if name.startswith("vision_model.")
        }
        yield {own_name(f"vision_tower.{name}"): value for name, value in state.items()}, str(file)
    for file in files:
        state = {
            own_name(name): value
            for name, value in read_state(file, setting).items()
            if not name.endswith(UNREAD)
        }
        yield state, str(file)


def own_name(name: str) -> str:
    """Translate a published tensor name to ClipFlanT5's.

    Old files nest the tower, and the embedding table has up to four names.
    """
    for part in ("vision_tower", "mm_projector"):
        _, mark, rest = name.rpartition(f"{part}.")
        if mark:
            return f"{part}.{rest.removeprefix('vision_model.')}"
    return "t5.shared.weight" if name.endswith("embed_tokens.weight") else f"t5.{name}"


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value

"""Drift of weights: against the weights in memory, whole and as adapters."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from capo.backbones.export import export_policy
from capo.backbones.lora import LORA_FILE, merged
from capo.backbones.model_card import ModelCard
from capo.backbones.weight_drift import block_of, weight_drift
from capo.errors import InputError
from capo.runtime import tensor_files
from fixtures.policies import tuned

CARD = ModelCard(objective="capo", data="nothing")


def drift(backbone, policy):
    part = backbone.denoiser_component
    return weight_drift(backbone.folder / part, backbone.variant, backbone.dtype, policy)


def by_hand(base, policy):
    """Relative norm of the difference of two states, by block and of all."""
    blocks = {}
    for name, value in base.items():
        one = value.double(), policy[name].double() - value.double()
        squares = blocks.setdefault(block_of(name), [0.0, 0.0])
        for place, tensor in enumerate(one):
            squares[place] += tensor.square().sum().item()
    total = [sum(squares[place] for squares in blocks.values()) for place in (0, 1)]
    return math.sqrt(total[1] / total[0]), {
        name: math.sqrt(change / norm) for name, (norm, change) in blocks.items()
    }


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
@pytest.mark.parametrize("lora", [False, True])
def test_drift_is_that_of_the_weights_in_memory(tiny_backbones, tmp_path, monkeypatch, name, lora):
    monkeypatch.setattr(tensor_files, "PART", 100)  # most tensors have several parts
    backbone = tiny_backbones[name]
    policy = tuned(backbone, lora=lora, seed=1)
    folder = export_policy(backbone, policy, tmp_path / "policy", CARD)
    whole = merged(policy, backbone.trainable_copy()) if lora else policy
    total, blocks = by_hand(backbone.denoiser.state_dict(), whole.state_dict())
    found = drift(backbone, folder)
    assert found.total == pytest.approx(total, rel=1e-5) and total > 0
    assert found.blocks == pytest.approx(blocks, rel=1e-4, abs=1e-7)
    assert len(blocks) > 3 and any(name.endswith(".0") for name in blocks)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_policy_that_was_not_tuned_has_not_moved_whatever_it_is_stored_in(tiny_backbones, tmp_path, dtype):
    backbone = tiny_backbones["sdxl"]
    folder = export_policy(backbone, backbone.trainable_copy(), tmp_path / "policy", CARD, dtype=dtype)
    found = drift(backbone, folder)
    assert found.total == 0 and set(found.blocks.values()) == {0}


def test_weights_that_do_not_compare_are_named(tiny_backbones, tmp_path):
    backbone = tiny_backbones["sdxl"]
    folder = export_policy(backbone, tuned(backbone, seed=1), tmp_path / "policy", CARD)
    file = next((folder / "unet").glob("*.safetensors"))
    state = load_file(file)
    name = "conv_in.weight"
    for changed, fault in {
        (): "differ in the tensors that they hold, for instance 'conv_in.weight'",
        (2, 2): r"'conv_in\.weight' has shape \(2, 2\)",
        None: r"tensor 'conv_in\.weight' of '.*' is not finite",
    }.items():
        given = {key: value for key, value in state.items() if key != name}
        if changed != ():
            given[name] = torch.full_like(state[name], torch.nan) if changed is None else torch.ones(changed)
        save_file(given, file, metadata={"format": "pt"})
        with pytest.raises(InputError, match=fault):
            drift(backbone, folder)
    adapter = export_policy(backbone, tuned(backbone, lora=True, seed=1), tmp_path / "adapter", CARD)
    save_file({"a": torch.ones(2)}, adapter / LORA_FILE)
    with pytest.raises(InputError, match="no plain LoRA adapter"):
        drift(backbone, adapter)

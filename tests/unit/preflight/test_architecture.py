"""Configs of which no network can be built are refused with their file, before anything is loaded."""

import json
import shutil
from pathlib import Path

import pytest

from capo.backbones.component_configs import Encoder, Network
from capo.cli.resolvers import shipped
from capo.errors import InputError
from capo.preflight.architecture import from_folder, published, published_names
from capo.runtime.schema import faults

SHAPES = Path(shipped("unet"))


@pytest.fixture
def edited(tmp_path):
    """Write a folder of the configs of the shapes model with one value changed."""

    def write(component, **changes):
        for path in SHAPES.glob("*/*.json"):
            copy = tmp_path / path.relative_to(SHAPES)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
        path = tmp_path / component / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return tmp_path

    return write


def test_sizes_that_no_network_has_are_refused_where_the_folder_is_read(edited):
    with pytest.raises(
        InputError, match=r"unet/config.json cannot be read \(block_out_channels=\[1000000000,"
    ):
        from_folder(edited("unet", block_out_channels=[10**9, 10**9]))
    with pytest.raises(InputError, match=r"text_encoder/config.json cannot be read \(hidden_size=-64: must"):
        from_folder(edited("text_encoder", hidden_size=-64))


@pytest.mark.parametrize("change", [{"act_fn": "nope"}, {"down_block_types": ["None"] * 2}])
def test_what_a_library_cannot_build_names_the_component(edited, change):
    blueprint = from_folder(edited("unet", **change))
    with pytest.raises(InputError, match=r"the sizes and classes in unet/config.json do not load: .* again"):
        blueprint.denoiser()


@pytest.mark.parametrize("name", published_names())
def test_configs_of_published_models_pass(name):
    for config in published(name).configs.values():
        assert not faults(Network if "_class_name" in config else Encoder, config)

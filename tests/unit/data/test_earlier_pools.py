"""Pools written before modules moved are read as they are.

Nothing in them is made again, and no reward has another name.

`fixtures/pools` holds a sampled and an imported pool, `fixtures/reward_fingerprints.json` the fingerprints
of all rewards. Version 0.1.0 wrote them, before the packages were laid out; only the fingerprints of the
rewards of the shapes world are newer, of shapes-v2, and those of rewards whose yaml has a `version`, since
their scores differ.
"""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from capo.backbones.sampling import SamplerSettings
from capo.cli.compose import composed
from capo.cli.named_rewards import all_rewards
from capo.data.generation import ImageGenerator, PoolSpec, fill_pool
from capo.data.importing import pickapic
from capo.data.importing.filling import import_pool
from capo.data.prompts import make_prompt
from capo.rewards import Reward
from fixtures import ROOT
from fixtures.fake_backbone import FakeBackbone

POOLS = ROOT / "tests" / "fixtures" / "pools"
KNOWN = json.loads((ROOT / "tests" / "fixtures" / "reward_fingerprints.json").read_text())
SETTINGS = SamplerSettings(steps=2, guidance=1.0, batch=4)


class Unused(FakeBackbone):
    """A backbone that may neither sample, decode nor encode."""

    name = "tiny"
    vae = SimpleNamespace(config=SimpleNamespace(block_out_channels=(1, 1)))

    def predict(self, *args):
        pytest.fail("the pool is sampled again")

    def decode(self, *args, **options):
        pytest.fail("the pool is scored again")

    def encode_images(self, pixels):
        pytest.fail("images are encoded again")


def files(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }


@pytest.fixture
def pools(tmp_path):
    return shutil.copytree(POOLS, tmp_path / "pools")


def test_a_sampled_pool_is_found_whole(pools):
    before = files(pools)
    rewards = [
        Reward(name, {"_target_": "fake_rewards.Brightness", "channel": number})
        for name, number in (("red", 0), ("blue", 2))
    ]
    prompts = [make_prompt(f"a {word} circle") for word in ("red", "blue", "green")]
    plan = PoolSpec(pools, "tiny", "train", 0, prompts, 4, 2)
    pool = fill_pool(plan, ImageGenerator.base(Unused(), SETTINGS), rewards, progress=False)
    assert files(pools) == before
    scores = pool.scores([reward.key for reward in rewards], 4, pool.positions(prompts))
    assert scores.shape == (3, 4, 2) and torch.equal(scores[..., 0], scores[..., 1])  # the images are gray


def test_an_imported_pool_is_found_whole(pools, monkeypatch):
    before = files(pools)
    monkeypatch.chdir(pools)  # the source's fingerprint holds the path that was given
    import_pool(
        pickapic("pairs.parquet"), Unused(), SETTINGS, pools, "tiny", prompts_per_shard=2, progress=False
    )
    assert files(pools) == before


@pytest.mark.parametrize("place", [place for place in KNOWN if not place.startswith("oracle/")])
def test_rewards_keep_their_fingerprints(place):
    file, name = place.split("/")
    entries = OmegaConf.to_container(composed(None, [f"+rewards={file}"]).rewards, resolve=True)
    assert Reward(name, **entries[name]).fingerprint == KNOWN[place]


def test_measures_of_the_oracle_keep_their_fingerprints():
    measures = all_rewards(composed("train", []))[2]
    assert {f"oracle/{measure.name}": measure.fingerprint for measure in measures} == {
        place: fingerprint for place, fingerprint in KNOWN.items() if place.startswith("oracle/")
    }

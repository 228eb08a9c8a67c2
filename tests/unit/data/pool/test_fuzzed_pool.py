"""Whatever happens to the bytes of a pool's files: a message, the same content, or made again."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capo.backbones.sampling import SamplerSettings
from capo.data.generation import ImageGenerator, PoolSpec, fill_pool
from capo.data.pool import Pool, PoolReader
from capo.data.prompts import make_prompt
from capo.errors import InputError
from capo.rewards import Reward
from fixtures.damage import damaged, examples, put
from fixtures.fake_backbone import FakeBackbone
from fixtures.fake_rewards import brightness

FAST, SLOW = 150, 1500
BUDGETS = [FAST, pytest.param(SLOW, marks=pytest.mark.slow)]
PROMPTS = [make_prompt(text) for text in ("a red circle", "a blue square", "the green star")]


REWARD = Reward("brightness", brightness)
GENERATOR = ImageGenerator.base(FakeBackbone(), SamplerSettings(steps=1, guidance=1.0, batch=16))


def fill(spec: PoolSpec, **options) -> Pool:
    return fill_pool(spec, GENERATOR, [REWARD], progress=False, **options)


def content(pool: Pool) -> tuple:
    """All that training and evaluation take from a pool."""
    reader = PoolReader(pool)
    return (
        pool.prompts,
        [reader.latents(place, range(4)).tolist() for _, place in pool.prompts],
        [{name: value.tolist() for name, value in reader.text(place).items()} for _, place in pool.prompts],
        pool.scores([REWARD.key], 4).tolist(),
    )


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    """Three prompts in two rows, four candidates."""
    root = tmp_path_factory.mktemp("fuzzed")
    return PoolSpec(root, "tiny", "train", 0, PROMPTS, candidates=4, prompts_per_shard=2)


@pytest.fixture(scope="module")
def whole(spec):
    """Files of the pool, and its content."""
    pool = fill(spec)
    before = content(pool)
    return {path: path.read_bytes() for path in files(pool.folder)}, before


def files(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def restore(kept: dict[Path, bytes]) -> None:
    for path, data in kept.items():
        if not path.is_file() or path.read_bytes() != data:
            put(path, data)


@pytest.mark.parametrize("number", BUDGETS)
@pytest.mark.parametrize("kind", ["manifest", "prompts", "text", "latents", "scores"])
@pytest.mark.parametrize("verify", [True, False], ids=["filled", "read"])
def test_damaged_bytes(spec, whole, kind, verify, number):
    kept, before = whole
    paths = [path for path in kept if kind in str(path.relative_to(spec.root))]

    @examples(number // 10)
    @given(st.data())
    def holds(data):
        restore(kept)
        path = data.draw(st.sampled_from(paths))
        put(path, data.draw(damaged(kept[path])))
        try:
            assert content(fill(spec, verify=verify)) == before
        except InputError as error:
            assert path.name in str(error) or kind == "manifest"
            assert not verify or kind in ("manifest", "prompts")  # all else is made again

    holds()
    restore(kept)

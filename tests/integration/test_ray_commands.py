"""Commands that fill pools by engine=ray with the workers that they build from their configuration."""

import os

import pytest

from fixtures.ray_clusters import MARKS, ray_cluster

pytestmark = MARKS


@pytest.fixture(scope="module", autouse=True)
def cluster():
    with ray_cluster(2) as ray:
        yield ray


def test_workers_of_a_local_cluster_have_the_priority_of_their_driver(cluster):
    assert cluster.get(cluster.remote(lambda: os.nice(0)).remote()) == os.nice(0)


def test_a_part_that_fails_ends_the_command_with_code_1_and_the_rest_is_made(typed, tmp_path, capsys):
    """Of 32 prompts three cannot be judged: 32 texts, 32 latents and 29 scores are made, 93 of 96 files."""
    words = ["blue" if number in (3, 17, 30) else "red" for number in range(32)]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"a {word} cat number {number}" for number, word in enumerate(words)))
    with pytest.raises(SystemExit) as end:
        typed(
            "generate",
            "engine=ray",
            f"pool.root={tmp_path / 'pools'}",
            f"hydra.run.dir={tmp_path / 'run'}",
            f"prompts.train={prompts}",
            "pool.prompts_per_shard=1",
            "rewards.r.scorer._target_=fixtures.fake_rewards.FailsOn",
        )
    told = capsys.readouterr().err
    assert end.value.code == 1
    assert "93 of 96 files are made; 3 failed" in told and "scores 00003-00: " in told
    assert "no idea of blue" in told
    (pool,) = (tmp_path / "pools").iterdir()
    made = {kind: len(list((pool / kind).rglob("*-00.*"))) for kind in ("latents", "scores")}
    assert made == {"latents": 32, "scores": 2 * 29} and len(list((pool / "text").iterdir())) == 32

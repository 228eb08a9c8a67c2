"""`generate.py` stage by stage: a reward more without sampling again, and no weights that are not needed."""

import hashlib

import diffusers
import pytest
import transformers

from capo.cli import generate as generate_script
from capo.cli import train as train_script
from capo.data import stages
from capo.errors import InputError
from capo.training import validation
from fixtures.tiny_pipelines import CONFIGURED


def digests(folder, pattern):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob(pattern))}


def scored(folder, split):
    return {path.name.split("-")[0] for path in folder.glob(f"tiny-*-{split}/scores/*")}


def test_a_third_reward_leaves_the_latents_alone_and_training_takes_it(tiny_run, monkeypatch, capsys):
    pools = tiny_run.folder / "pools"
    generate_script.run(tiny_run("two", config="generate"))
    assert scored(pools, "train") == scored(pools, "validation") == {"r", "g"}
    latents, scores = digests(pools, "*/latents/*"), digests(pools, "*/scores/*/*")
    sample = stages.sample_prompts

    def refuse(*args, **options):
        raise AssertionError("sampled again")

    monkeypatch.setattr(stages, "sample_prompts", refuse)
    generate_script.run(tiny_run("third", "stage=score", config="generate", rewards=3))
    assert scored(pools, "train") == scored(pools, "validation") == {"r", "g", "b"}
    assert digests(pools, "*/latents/*") == latents and len(latents) >= 4
    after = digests(pools, "*/scores/*/*")
    assert {path: after[path] for path in scores} == scores and len(after) > len(scores)
    assert validation.sample_prompts is sample  # the policy's images are drawn, the base's are there
    capsys.readouterr()
    train_script.run(tiny_run("trained", "evaluate=false", rewards=3))
    assert "4 prompts x 4 candidates of the base, scored by b, g, r" in " ".join(
        capsys.readouterr().out.replace("│", " ").split()
    )
    assert digests(pools, "*/latents/*") == latents


def test_the_stage_that_scores_has_one_documented_name(tiny_run):
    with pytest.raises(
        InputError,
        match=r"stage=scor: must be one of all, text, latents, score, import, .*; did you mean score\?",
    ):
        generate_script.run(tiny_run("slip", "stage=scor", config="generate"))


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_a_stage_loads_no_weights_that_it_does_not_compute_with(tiny_run, tiny_folders, monkeypatch, family):
    """The pools are those of all stages at once, to the byte."""
    loaded = []
    for kind in (diffusers.ModelMixin, transformers.PreTrainedModel):

        def from_pretrained(cls, *args, load=kind.from_pretrained.__func__, **options):
            loaded.append(cls.__name__)
            return load(cls, *args, **options)

        monkeypatch.setattr(kind, "from_pretrained", classmethod(from_pretrained))
    here = (
        *CONFIGURED[family],
        f"model.backbone.weights={tiny_folders[family]}",
        "sampling.batch=3",
        "prompts=text",
        f"model.name={family}",
    )

    def made(name, stage):
        loaded.clear()
        root = tiny_run.folder / name / "pools"
        generate_script.run(tiny_run(name, *here, f"pool.root={root}", f"stage={stage}", config="generate"))
        return set(loaded), {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}

    whole, expected = made(f"{family}-all", "all")
    denoiser = {"sdxl": "UNet2DConditionModel", "sd3": "SD3Transformer2DModel"}[family]
    encoders = whole - {denoiser, "AutoencoderKL"}
    assert len(encoders) == {"sdxl": 2, "sd3": 2}[family]  # of SD3 the two CLIPs are of one class
    for stage, needed in (("text", encoders), ("latents", encoders | {denoiser}), ("score", set())):
        found, pools = made(f"{family}-stages", stage)
        assert found == needed | {"AutoencoderKL"}
    assert pools == expected

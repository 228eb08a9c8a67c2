"""The whole path on pipelines of the real classes.

Generate, train, validate, export, and reload without this package.
"""

import json

import diffusers
import pytest
import torch

from capo.cli import generate, train
from fixtures.tiny_pipelines import CONFIGURED

SMALL = (
    "sampling.guidance=3",
    "trainer.warm_up=0",
    "trainer.micro_batch=1",
    "trainer.lr=1e-3",
    "objective.beta=100",
    "prompts=text",
    "sampling.batch=4",
)
FAST = (("sdxl", "lora"), ("sd3", "full"))


@pytest.mark.parametrize(
    ("name", "tuning"),
    [
        pytest.param(name, tuning, marks=[] if (name, tuning) in FAST else [pytest.mark.slow])
        for name in CONFIGURED
        for tuning in ("full", "lora")
    ],
)
def test_from_prompts_to_a_policy_that_diffusers_loads(tiny_run, tiny_folders, monkeypatch, name, tuning):
    """Full tuning in float32.

    LoRA as the model's yaml has it, under bf16 autocast with gradient checkpointing.
    """
    options = {
        "full": (
            "trainer.precision=32-true",
            "sampling.precision=32-true",
            "trainer.gradient_checkpointing=false",
        ),
        "lora": ("model.lora={rank:2,alpha:2,seed:0}", "trainer.gradient_checkpointing=true"),
    }[tuning]
    here = (
        *CONFIGURED[name],
        f"model.backbone.weights={tiny_folders[name]}",
        *SMALL,
        f"model.name={name}",
        *options,
    )
    generate.run(tiny_run(f"{name}-{tuning}-pools", *here, config="generate"))
    pools = sorted(path.name for path in (tiny_run.folder / "pools").glob(f"{name}-*"))
    cfg = tiny_run(f"{name}-{tuning}", *here)
    assert 0 <= train.run(cfg) <= 1
    assert (
        sorted(path.name for path in (tiny_run.folder / "pools").glob(f"{name}-*"))[: len(pools)] == pools
    )  # found again
    folder = tiny_run.folder / f"{name}-{tuning}"
    assert json.loads((folder / "evaluation" / "results.json").read_text())["win_rate"].keys() == {"r"}
    assert list((folder / "validation").glob("step*.png"))
    monkeypatch.chdir(folder)
    names = {}
    code = (folder / "policy" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(code, names)
    pipe = names["pipe"]
    assert type(pipe).__module__.startswith(diffusers.__name__)
    image = pipe("red cat", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (16, 16)

"""evaluate.py benchmark=NAME, from its configuration to the tables."""

import csv
import json
import shutil

import pytest
from huggingface_hub import constants
from PIL import Image

from capo.backbones.export import export_policy
from capo.backbones.model_card import ModelCard
from capo.cli import evaluate as evaluate_script
from capo.cli.benchmark import benchmark_rewards
from capo.cli.schema import Evaluating, check_values
from capo.errors import InputError
from capo.rewards.blip_vqa_hf import BlipVQAHF
from capo.shapes.oracle import alignments
from fixtures.configuration import composed
from fixtures.policies import tuned
from fixtures.tiny_blip import build_blip


def test_the_shapes_are_drawn_and_judged_without_a_network(tmp_path):
    given = [
        "benchmark=shapes",
        "benchmark.set.prompts=8",
        "benchmark.set.images=1",
        "sampling.steps=2",
        f"pool.root={tmp_path / 'pools'}",
        "threads=1",
    ]
    found = evaluate_script.run(composed(*given, name="evaluate"), given, tmp_path / "out")
    assert found["rows"] == ["base"] and list(found["measures"]) == ["alignment", "assertions", "looks"]
    with (tmp_path / "out" / "images.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    images = [Image.open(tmp_path / "out" / "images" / "base" / row["file"]) for row in rows]
    judged = alignments(images, [row["prompt"] for row in rows])
    for part, entry in found["measures"]["alignment"].items():
        held = [part in ("overall", row["category"]) for row in rows]
        assert entry["rows"]["base"]["mean"] == round(judged[held].double().mean().item(), 6)
    assert "There is no official scorer" in (tmp_path / "out" / "README.md").read_text()


@pytest.fixture(scope="module")
def policy(tiny_backbone, tmp_path_factory):
    """An exported policy of the tiny pipeline."""
    folder = tmp_path_factory.mktemp("tuned") / "policy"
    return export_policy(tiny_backbone, tuned(tiny_backbone), folder, ModelCard("capo", "nothing"))


@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    path = tmp_path_factory.mktemp("list") / "evaluation_metadata.jsonl"
    prompts = {"a red cat": "colors", "a blue dog": "colors", "a cat left of a dog": "position"}
    rows = [{"tag": tag, "include": [], "prompt": prompt} for prompt, tag in prompts.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def geneval(tiny_run, listed):
    """Runs evaluate.py benchmark=geneval on the tiny pipeline."""

    def run(folder, *given):
        given = ["benchmark=geneval", f"benchmark.set.path={listed}", "benchmark.set.images=2", *given]
        return evaluate_script.run(tiny_run("none", *given, config="evaluate"), given, folder)

    return run


def denoisers(folder) -> dict[str, str]:
    mark = json.loads((folder / "benchmark.json").read_text())
    return {row: known["denoiser"] for row, known in mark.items()}


def test_policy_and_base_are_drawn_once_from_the_same_seeds(geneval, policy, tmp_path, monkeypatch):
    found = geneval(tmp_path / "out", f"policy={policy}")
    assert found["rows"] == ["policy", "base"] and found["measures"] == {}
    sides = [sorted((tmp_path / "out" / "images" / row).rglob("*.png")) for row in ("policy", "base")]
    assert [len(side) for side in sides] == [6, 6]
    assert all(one.read_bytes() != other.read_bytes() for one, other in zip(*sides, strict=True))
    whole = {path: path.read_bytes() for path in (tmp_path / "out" / "images").rglob("*.*")}
    shutil.rmtree(tmp_path / "out" / "images" / "policy" / "00001")
    monkeypatch.setattr("capo.data.stages.sample_prompts", None)  # from the pools
    geneval(tmp_path / "out", f"policy={policy}")
    assert whole == {path: path.read_bytes() for path in (tmp_path / "out" / "images").rglob("*.*")}
    with pytest.raises(InputError, match="images/base holds other images:\n  seed: 42 -> 1"):
        geneval(tmp_path / "out", "benchmark.seed=1")
    with pytest.raises(InputError, match=r"pool.root=.*: the images of the policy go there"):
        geneval(tmp_path / "out", f"pool.root={tmp_path / 'out' / 'pool'}")


def hub_id(folder, cache, leave_out=()) -> str:
    """`folder` in the hub's cache as me/tuned."""
    repository = cache / "models--me--tuned"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("c" * 40)
    shutil.copytree(folder, repository / "snapshots" / ("c" * 40), ignore=shutil.ignore_patterns(*leave_out))
    return "me/tuned"


@pytest.mark.parametrize("whole", [False, True], ids=["denoiser", "pipeline"])
def test_a_model_of_others_is_named_by_its_hub_id(geneval, policy, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    source = hub_id(
        policy, tmp_path / "hub", ["base.json"] if whole else ["model_index.json", "vae", "text*"]
    )
    ours = geneval(tmp_path / "ours", f"policy={policy}", "benchmark.base=false")
    theirs = geneval(tmp_path / "theirs", f"policy={source}", "benchmark.base=false")
    assert ours["rows"] == theirs["rows"] == ["policy"]
    trees = [
        {
            path.name: path.read_bytes()
            for path in (tmp_path / name / "images" / "policy" / "00002").rglob("*.png")
        }
        for name in ("ours", "theirs")
    ]
    assert trees[0] == trees[1] and denoisers(tmp_path / "ours") == denoisers(tmp_path / "theirs")
    with pytest.raises(InputError, match=r"policy=me/unknown: no such folder .*, and neither http"):
        geneval(tmp_path / "none", "policy=me/unknown")
    with pytest.raises(InputError, match=r"policy 'no/such/folder' |policy '.*no/such/folder': neither"):
        geneval(tmp_path / "none", "policy=no/such/folder")


def test_results_become_a_table(geneval, listed, tmp_path):
    for name, correct in (("ours", 1), ("theirs", 0)):
        rows = [
            {
                "filename": f"{name}/{row:05d}/samples/{image:05d}.png",
                "correct": image <= correct,
                "prompt": prompt,
            }
            for row, prompt in enumerate(("a red cat", "a blue dog", "a cat left of a dog"))
            for image in range(2)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = geneval(tmp_path, f"results=[{tmp_path / 'ours.jsonl'},{tmp_path / 'theirs.jsonl'}]")
    entry = found["measures"]["geneval"]["overall"]
    assert entry["rows"]["ours"]["mean"] == 1.0 and entry["rows"]["theirs"]["mean"] == 0.5
    assert entry["differences"]["ours"]["mean"] == 0.5
    assert {path.name for path in (tmp_path / "official").iterdir()} == {
        "results.json",
        "report.html",
        "table.csv",
        "table.tex",
    }
    assert not (tmp_path / "images").exists()
    with pytest.raises(InputError, match=r"results=a.jsonl: name the benchmark"):
        evaluate_script.run(composed("results=a.jsonl", name="evaluate"), [], tmp_path)


def test_images_of_t2i_compbench_are_scored_by_blip_in_its_categories(tiny_run, policy, tmp_path):
    prompts = ["a red cat and a blue dog", "the green bench."]
    (tmp_path / "color_val.txt").write_text("\n".join(prompts))
    (tmp_path / "spatial_val.txt").write_text("a cat on a dog\n")
    build_blip(tmp_path / "blip")

    def run(folder, categories):
        given = [
            "benchmark=t2i_compbench",
            f"benchmark.set.path={tmp_path}",
            f"benchmark.set.categories=[{categories}]",
            "benchmark.set.images=2",
            "rewards@benchmark.rewards=blip_vqa_hf",
            f"benchmark.rewards.blip-vqa-hf.weights={tmp_path / 'blip'}",
            f"policy={policy}",
        ]
        return evaluate_script.run(tiny_run("none", *given, config="evaluate"), given, folder)

    found = run(tmp_path / "out", "color,spatial")["measures"]["blip-vqa-hf"]
    assert list(found) == ["color"] and found["color"]["prompts"] == 2
    scorer = BlipVQAHF(str(tmp_path / "blip"))
    for row, figures in found["color"]["rows"].items():
        tree = tmp_path / "out" / "images" / row / "color" / "samples"
        names = [f"{prompts[number // 2]}_{number:06d}.png" for number in range(4)]
        images = [Image.open(tree / name) for name in names]
        scores = scorer(images, [prompts[number // 2] for number in range(4)])
        assert figures["mean"] == pytest.approx(scores.mean().item(), abs=1e-5)
        one, two = sorted(scores.view(2, 2).mean(1).tolist())
        # of four resamples of two prompts one has the first alone, one the second
        assert (figures["low"], figures["high"]) == pytest.approx((one, two), abs=1e-5)
    assert found["color"]["win_rates"]["policy"]["mean"] >= 0
    assert "not comparable with published figures" in (tmp_path / "out" / "report.html").read_text()
    with pytest.raises(InputError, match=r"blip-vqa-hf is a figure of color, shape, texture alone, and what"):
        run(tmp_path / "none", "spatial")
    assert not (tmp_path / "none").exists()


def test_scorers_of_a_benchmark_are_chosen_by_name():
    def named(*given):
        cfg = composed(*given, name="evaluate")
        check_values(cfg, Evaluating)
        return [reward.name for reward in benchmark_rewards(cfg)]

    assert named("benchmark=hpsv2") == ["hpsv2"] and named("benchmark=genai") == ["vqascore"]
    assert named("benchmark=hpsv2", "rewards@benchmark.rewards=[]") == named("benchmark=dpg") == []
    metadata = "benchmark.rewards.geneval-hf.scorer.metadata=list.jsonl"
    assert named("benchmark=geneval", "rewards@benchmark.rewards=geneval_hf", metadata) == ["geneval-hf"]
    assert named("benchmark=t2i_compbench", "rewards@benchmark.rewards=[clip_b32,blip_vqa_hf]") == [
        "blip-vqa-hf", "clip_b32",
    ]  # fmt: skip
    assert named("benchmark=parti") == ["alignment", "looks", "preference"]  # of the evaluation
    assert named("benchmark=parti", "rewards@benchmark.rewards=[looks]") == ["looks"]
    assert named("benchmark=shapes") == ["alignment", "assertions", "looks"]
    assert named("benchmark=shapes", "rewards@benchmark.rewards=looks") == ["looks"]
    with pytest.raises(InputError, match=r"benchmark.rewards=evaluation.oracle: model=sd15 has none there"):
        named("benchmark=shapes", "model=sd15")


def test_values_of_a_benchmark_are_checked(geneval, tmp_path):
    for given, says in (
        ("benchmark.seed=-1", "benchmark.seed=-1: must be a whole number"),
        ("benchmark.base=2", "benchmark.base=2: must be true or false"),
        ("benchmark.set.images=x", "benchmark.set.images=x: must be a whole number"),
        ("+benchmark.set.image=2", "takes no such argument; did you mean benchmark.set.images"),
        ("benchmark.set._target_=capo.pairs.frs", "is nothing of this package that benchmark.set takes"),
        ("benchmark.rewards=looks", "benchmark.rewards=looks: must be evaluation.rewards, "),
        ("results=[]", r"results=\[\]: must be a file or a list of files"),
    ):
        with pytest.raises(InputError, match=says):
            geneval(tmp_path, given)

"""What a configuration may call: registered names; own code where the command line names it."""

import copy
import importlib
import pkgutil
import re
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import capo.objectives
from capo.backbones import Backbone
from capo.cli import evaluate as evaluate_script
from capo.cli.build import family_of
from capo.cli.run_config import run_config
from capo.cli.schema import check_values
from capo.cli.targets import PLACES, calls, place_of
from capo.errors import InputError
from capo.rewards import load_rewards, lookup
from capo.rewards.isolated import IsolatedScorer
from capo.runtime import hub
from fixtures.configuration import composed


@pytest.fixture(scope="module")
def honest():
    """The stored configuration of a run on the shapes, which calls registered names alone."""
    return OmegaConf.to_container(composed(), resolve=True)


@pytest.fixture(scope="module")
def composed_once():
    return composed(name="evaluate")


@pytest.fixture
def asked(composed_once):
    """What the command line asks of evaluate.py; other values are set in it."""
    return copy.deepcopy(composed_once)


@pytest.fixture
def stranger(honest, asked, tmp_path, monkeypatch):
    """Evaluates a finished run whose config.yaml has other values; returns the refusal.

    Nothing beside the run may have changed by then, and what would be loaded next is never reached.
    """
    root = tmp_path / "root"
    (root / "victim").mkdir(parents=True)
    (root / "victim" / "thesis.txt").write_text("years of work")
    (root / "program").write_text("#!/bin/sh\ntouch executed\n")
    (root / "program").chmod(0o755)
    monkeypatch.chdir(root)

    def reached(*arguments, **given):
        raise AssertionError("a stranger's configuration was accepted")

    monkeypatch.setattr(evaluate_script, "build_components", reached)
    monkeypatch.setattr(hub, "check_access", reached)

    def refused(values: dict, trust: tuple[str, ...] = ()) -> str:
        cfg = OmegaConf.create(copy.deepcopy(honest))
        for key, value in values.items():
            OmegaConf.update(cfg, key, value, merge=False, force_add=True)
        (tmp_path / "run" / "policy").mkdir(parents=True)
        OmegaConf.save(cfg, tmp_path / "run" / "config.yaml")
        (tmp_path / "run" / "outcome.json").write_text("{}")
        asked.run, asked.trust = str(tmp_path / "run"), list(trust)
        before = content(tmp_path)
        try:
            with pytest.raises(InputError) as error:
                evaluate_script.run(asked, [f"run={asked.run}"], tmp_path / "run")
        finally:
            assert content(tmp_path) == before
        return str(error.value)

    return refused


def content(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def calling(target: str, **arguments) -> dict:
    return {"_target_": target, **arguments}


def scored_by(scorer: dict, **facts) -> dict:
    return {"evaluation.rewards": {"own": {"scorer": scorer, **facts}}}


LOOKS = "capo.shapes.rewards.LooksScorer"
WRITING = calling("capo.runtime.files.write_whole", _args_=["written.txt", "text"])


@pytest.mark.parametrize("values", [
    # attributes that modules of the package have by importing others
    {"prompts": calling("capo.data.generation.shutil.copy", src="program", dst="copied")},
    {"prompts": calling("capo.data.generation.shutil.rmtree", path="victim")},
    {"objective": calling("capo.rewards.isolated.subprocess.run", args=["./program"])},
    {"pairs": calling("capo.rewards.isolated.os.system", command="./program")},
    # the package's own: writers of files, loaders of modules, the scorer that starts an interpreter
    {"prompts": WRITING},
    {"objective": calling("capo.runtime.files.write_whole", path="written.txt", _partial_=True)},
    {"pairs": calling("capo.rewards.lookup.load", module="antigravity")},
    {"prompts": calling("capo.rewards.lookup.build", node=calling("os.system", command="./program"))},
    {"objective": calling("capo.runtime.hub.push", folder="victim", name="stranger/collected")},
    {"objective": calling("capo.shapes.make.__main__.main")},
    scored_by(calling("capo.rewards.isolated.IsolatedScorer", _args_=["own", "./program", {"x": "y"}])),
    scored_by(calling("capo.rewards.isolated.IsolatedScorer", name="own", python="./program", scorer={})),
    scored_by(calling("capo.rewards.lookup.load", module="antigravity", _partial_=True)),
    # what is registered, at another place
    {"objective": calling("capo.data.prompts.text_files", train="a", validation="b", test="c")},
    scored_by(calling("capo.objectives.capo", _partial_=True)),
    {"model.backbone": calling(LOOKS, weights="w")},
    # inside what is registered
    scored_by(calling(LOOKS, weights=WRITING)),
    {"model.backbone.weights": WRITING},
    {"prompts": calling("capo.data.prompts.text_files", train=[WRITING], validation="b", test="c")},
    # where nothing is called
    {"validation.strengths": [WRITING]},
    {"surprise.below": WRITING},
    {"model.lora": {"rank": 2, "alpha": 2, "seed": 0, "init": WRITING}},
    {"model.known_images": WRITING},
    # names that only come about when they are resolved
    {"objective": "${oc.create:'{_target_: capo.rewards.isolated.os.system, command: ./program}'}"},
    {"run_dir": "x", "objective._target_": "${run_dir}"},
    {"model.name": "${oc.env:HOME}"},
    # words that change how a target is called
    {"objective._args_": ["a"]},
    {"objective._recursive_": True},
    {"pairs._convert_": "object"},
    {"prompts._recursive_": False},
    # a module would be imported to look whether it is there, a program started
    scored_by(calling(LOOKS, weights="w"), requires=["antigravity.sub"]),
    scored_by(calling(LOOKS, weights="w"), python="./program"),
    scored_by(calling("capo.rewards.vila.VILA", weights="victim")),  # a graph whose operations may write
    scored_by(calling(LOOKS, weights="w"), requires={"antigravity.sub": 1}),
    scored_by(calling(LOOKS, weights="w"), requires=[3]),
    {"pool.root": "elsewhere"},
])  # fmt: skip
def test_a_strangers_configuration_is_refused_and_does_nothing(stranger, values):
    message = stranger(values)
    assert len(message.splitlines()) <= 3 and "antigravity" not in sys.modules
    assert "config.yaml" in message or ".requires=" in message


@pytest.mark.parametrize(("values", "message"), [
    ({"pool.root": "${nothing}"}, r"has pool.root=\${nothing}, which is not resolved"),
    ({"trainer.max_steps": "${nothing}"}, r"config.yaml cannot be read \(Interpolation key 'nothing'"),
    ({"evaluation": "text"}, r"has evaluation=text: must be a section of keys \(seed, images"),
    ({"evaluation": {"seed": 0}}, "its config.yaml has no evaluation.oracle"),
    ({"model": {"backbone": {"weights": "w"}}}, "model.backbone|config.yaml has no model"),
    ({"evaluation.rewards": ["looks"]}, r"evaluation.rewards=\['looks'\]: must be rewards by name"),
    ({"evaluation.rewards": {"own": "looks"}}, r"rewards.own=looks: must be a section of keys \(scorer"),
    (scored_by("text"), "evaluation.rewards.own.scorer=text: must be a mapping that names what is called"),
    (scored_by({"weights": "w"}), "evaluation.rewards.own.scorer=.*: must be a mapping that names what"),
    (scored_by(calling(LOOKS, weights="w"), weights={"a": 1}), "own.weights=.*: must be text, or null"),
    (scored_by(calling(LOOKS, weights="w"), version="x"), "own.version=x: must be a whole number"),
])  # fmt: skip
def test_a_configuration_that_is_damaged_is_one_message(stranger, values, message):
    assert re.search(message, stranger(values))


def test_a_log_in_a_folder_of_a_strangers_choice_is_refused(stranger):
    message = stranger(scored_by(calling(LOOKS, weights="w"), logs="victim", isolated=True))
    assert "evaluation.rewards.own.logs=victim: there is no such key" in message


@pytest.mark.parametrize("name", ["policy", "evaluation", "benchmarks", "study"])
def test_a_run_of_which_a_folder_leads_elsewhere_is_refused(honest, asked, tmp_path, name):
    run = tmp_path / "run"
    run.mkdir()
    OmegaConf.save(OmegaConf.create(honest), run / "config.yaml")
    (run / "outcome.json").write_text("{}")
    assert run_config(run, asked, [])
    (run / name).symlink_to(tmp_path)
    with pytest.raises(InputError, match=rf"run/{name} is a link to {tmp_path}, outside of"):
        run_config(run, asked, [])


def test_a_recipe_beside_a_run_is_refused(honest, asked, tmp_path):
    OmegaConf.save(OmegaConf.create(honest), tmp_path / "config.yaml")
    (tmp_path / "outcome.json").write_text("{}")
    with pytest.raises(InputError, match=r"experiment=lora beside run=.*: a run is evaluated with its own"):
        run_config(tmp_path, asked, ["experiment=lora"])
    assert run_config(tmp_path, asked, ["experiment=null"])


def test_what_acts_outside_the_run_comes_from_the_command_line(honest, asked, tmp_path):
    stored = copy.deepcopy(honest) | {
        "push_to_hub": "stranger/collected",
        "logger": {"theirs": calling("lightning.pytorch.loggers.MLFlowLogger")},
        "run_dir": "/elsewhere",
        "hydra": {"launcher": calling("os.system")},
    }
    OmegaConf.save(OmegaConf.create(stored), tmp_path / "config.yaml")
    (tmp_path / "outcome.json").write_text("{}")
    assert run_config(tmp_path, asked, []).push_to_hub is None
    asked.push_to_hub = "mine/policy"
    own = run_config(tmp_path, asked, ["push_to_hub=mine/policy"])
    assert own.push_to_hub == "mine/policy" and own.run_dir == str(tmp_path)
    assert list(own.logger) == ["csv"] and "hydra" not in own


def test_a_module_of_ones_own_that_is_not_found_is_told_with_where_it_is_looked_for():
    for key in ("objective", "pairs"):
        with pytest.raises(InputError, match=rf"{key}._target_=mine.own: .*PYTHONPATH, and mine is not"):
            check_values(composed(f"{key}._target_=mine.own"))
    with pytest.raises(InputError, match=r"model.backbone._target_=mine.Own: cannot be used .*in PYTHONPATH"):
        family_of(composed("model.backbone._target_=mine.Own"))
    with pytest.raises(InputError, match=r"math.nothing: cannot be used .*; give module.function$"):
        check_values(composed("objective._target_=math.nothing"))


def test_an_honest_configuration_passes_whatever_it_uses(asked, tmp_path):
    (tmp_path / "outcome.json").write_text("{}")
    for choices in ([], ["model=sdxl", "rewards=table4"], ["model=sd3", "objective=ipo", "pairs=sum"]):
        cfg = composed(*choices, "logger=wandb")
        OmegaConf.save(cfg, tmp_path / "config.yaml", resolve=True)
        own = run_config(tmp_path, asked, [])
        assert own.objective == cfg.objective and own.evaluation == cfg.evaluation


def test_trust_names_one_target_exactly(stranger, asked, tmp_path):
    own = scored_by(calling("elsewhere.Scorer"))
    message = stranger(own)
    assert "evaluation.rewards.own.scorer._target_=elsewhere.Scorer" in message
    assert "trust=[elsewhere.Scorer]" in message
    folder, cfg = tmp_path / "run", asked
    for given, passes in (("elsewhere.Scorer", True), ("elsewhere", False), ("elsewhere.Score", False)):
        cfg.trust = [given]
        if passes:
            assert run_config(folder, cfg, []).evaluation.rewards.own.scorer._target_ == "elsewhere.Scorer"
        else:
            with pytest.raises(InputError, match=r"trust=\[elsewhere.Scorer\]"):
                run_config(folder, cfg, [])


@pytest.mark.parametrize(
    "name", ["rewards.isolated.subprocess.run", "rewards.reward.Missing", "runtime.files.write_json"]
)
def test_no_trust_is_offered_to_a_name_that_is_refused_everywhere(stranger, name):
    message = stranger(scored_by(calling(f"capo.{name}")))
    assert f"evaluation.rewards.own.scorer._target_=capo.{name}, which cannot be used (" in message
    assert "trust=[" not in message and message.endswith("restore it, or leave the run out")


def test_trust_covers_no_way_of_calling(stranger):
    nested = scored_by(calling("elsewhere.Scorer", part=calling("elsewhere.Part")))
    message = stranger(nested, ("elsewhere.Scorer", "elsewhere.Part"))
    assert "evaluation.rewards.own.scorer.part._target_=elsewhere.Part" in message


def test_what_the_command_line_replaces_is_not_the_strangers(honest, tmp_path):
    stored = copy.deepcopy(honest)
    stored["evaluation"]["rewards"] = {"own": {"scorer": calling("elsewhere.Scorer"), "python": "./program"}}
    OmegaConf.save(OmegaConf.create(stored), tmp_path / "config.yaml")
    (tmp_path / "outcome.json").write_text("{}")
    overrides = [f"run={tmp_path}", "rewards@evaluation.rewards=looks"]
    own = run_config(tmp_path, composed(*overrides, name="evaluate"), overrides)
    assert list(own.evaluation.rewards) == ["looks"]


def test_the_remedy_for_an_interpreter_and_a_root_is_a_word_on_the_command_line(stranger):
    assert "trust=[./program]" in stranger(scored_by(calling(LOOKS, weights="w"), python="./program"))


def test_another_root_is_given_on_the_command_line(stranger, asked, tmp_path):
    assert "pool.root=elsewhere for the same one" in stranger({"pool.root": "elsewhere"})
    asked.pool.root = "chosen"
    assert run_config(tmp_path / "run", asked, ["pool.root=chosen"]).pool.root == "chosen"


@pytest.mark.parametrize(("overrides", "message"), [
    (["objective._target_=capo.rewards.isolated.os.system"],
     "objective._target_=capo.rewards.isolated.os.system: cannot be used"),
    (["pairs._target_=capo.runtime.files.write_whole"],
     "pairs._target_=capo.runtime.files.write_whole: cannot be used"),
    (["+trainer.callback._target_=os.system"],
     "trainer.callback._target_=os.system: nothing is called there"),
    (["+seed_of._target_=os.system"], "seed_of._target_=os.system: nothing is called there"),
    (["model.backbone._target_=capo.objectives.capo"],
     "model.backbone._target_=capo.objectives.capo: cannot be used"),
    (["objective._target_=3"], "objective._target_=3: cannot be used"),
])  # fmt: skip
def test_a_slip_on_the_command_line_is_refused_too(overrides, message):
    with pytest.raises(InputError) as error:
        check_values(composed(*overrides))
    assert message in str(error.value)


@pytest.mark.parametrize("target", [
    "capo.rewards.isolated.subprocess.run",
    "capo.rewards.isolated.os.system",
    "capo.rewards.isolated.IsolatedScorer",
    "capo.rewards.lookup.load",
    "capo.rewards.lookup.build",
    "capo.runtime.files.write_whole",
    "capo.rewards.reward.lookup.load",
    "capo.shapes.oracle.torch.load",
    "own_reward.os.system",
    "own_reward.Light.__init__",
])  # fmt: skip
def test_the_workers_own_look_up_refuses_what_is_no_scorer(target, tmp_path, monkeypatch):
    (tmp_path / "own_reward.py").write_text(
        "import os\nclass Light:\n    def __init__(self):\n        pass\n"
        "    def __call__(self, images, prompts):\n        return [1.0 for _ in images]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    called = []
    monkeypatch.setattr("os.system", called.append)
    monkeypatch.setattr("subprocess.run", lambda *given, **more: called.append(given))
    with pytest.raises(ImportError, match=target):
        lookup.build({"_target_": target, "_partial_": False, "_args_": ["true"]})
    assert not called and callable(lookup.build({"_target_": "own_reward.Light"}))
    sys.modules.pop("own_reward")


def test_the_worker_in_its_own_process_refuses_it_too(tmp_path):
    target = "capo.rewards.isolated.os.mkdir"
    scorer = IsolatedScorer("own", sys.executable, {"_target_": target, "path": str(tmp_path / "made")},
                            60, tmp_path / "log")  # fmt: skip
    with pytest.raises(InputError, match=r"ImportError: capo.rewards.isolated.os.mkdir leads through os"):
        scorer.to("cpu")
    assert not (tmp_path / "made").exists()


def test_a_rewards_entry_names_no_folder_for_its_log():
    with pytest.raises(InputError, match="own: unknown key logs"):
        load_rewards({"own": {"scorer": calling(LOOKS, weights="w"), "logs": "victim"}})


REGISTERED = {
    "objective": {
        "capo", "capo_group", "dmpo", "dpo", "hinge", "ipo", "kto", "linear_dpo", "mapo", "sdpo", "sft",
        "smpo",
    },
    "pairs": {"best_worst", "frs", "random_pair", "reward_sum"},
    "prompts": {"split_sets", "text_files", "prompt_sets"},
    "model.backbone": {"MMDiTBackbone", "UNetBackbone"},
    "model.known_images": {"photograph", "known_scenes"},
    "rewards.*.scorer": {
        "AlignmentScorer", "LooksScorer", "PreferenceScorer", "alignments", "assertion_shares", "ratings",
        "BlipVQAHF", "ClipScore", "GenEvalHF", "HPSv2", "HPSv3", "ImageReward", "LaionAesthetics", "MPS",
        "PickScore", "VILA", "VQAScore", "VQAScoreVLM",
    },
    "benchmark.set": {"dpg", "genai", "geneval", "hpsv2", "parti", "shapes", "t2i_compbench"},
    "logger.*": {"csv_logger", "tensorboard_logger", "wandb_logger"},
    "import": {"pickapic", "rankings", "folder"},
}  # fmt: skip


EXTRAS = {"wandb_workspaces"}  # of modules that only a command of their own imports


def test_the_registry_holds_what_it_is_meant_to_hold_and_nothing_else():
    """Every name of every module of the package, tried at every place."""
    found = {key: set() for key in REGISTERED}
    places = [place for place in PLACES if place.key in found]
    modules = [
        info.name for info in pkgutil.walk_packages(capo.__path__, "capo.") if "__main__" not in info.name
    ]
    assert len(modules) > 100
    for name in modules:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            assert error.name in EXTRAS
            continue
        for member in vars(module):
            for place in places:
                if place.registered(f"{name}.{member}") is not None:
                    found[place.key].add(member)
    assert found == REGISTERED


def test_what_stands_in_the_right_package_is_registered_without_an_entry(tmp_path, monkeypatch):
    (tmp_path / "own_hinge.py").write_text(
        "from capo.objectives import requires, dpo\n"
        "@requires()\ndef hinge(errors, *, beta: float):\n    return errors.gap\n"
        "def helper(errors):\n    return errors.gap\n"
    )
    monkeypatch.setattr(capo.objectives, "__path__", [*capo.objectives.__path__, str(tmp_path)])
    place = place_of(("objective",))
    assert place.registered("capo.objectives.own_hinge.hinge").__name__ == "hinge"
    assert [place.registered(f"capo.objectives.own_hinge.{name}") for name in ("helper", "dpo", "other")] == [
        None
    ] * 3
    sys.modules.pop("capo.objectives.own_hinge")


def test_a_place_has_rules_for_every_target_of_the_repository(honest):
    assert {place_of(path).key for path, _ in calls(honest)} == {
        "objective", "pairs", "prompts", "model.backbone", "model.known_images", "logger.*",
        "rewards.*.scorer", "evaluation.rewards.*.scorer", "evaluation.oracle.*.scorer",
    }  # fmt: skip


class Unlike:
    """No backbone at all."""


class Unfinished(Backbone):
    """One without methods."""


def method(weights):
    return None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Unlike", r"it is no subclass of capo\.backbones\.Backbone"),
        ("method", r"it is no subclass of capo\.backbones\.Backbone"),
        ("Unfinished", r"it lacks .*denoiser_inputs, .*; define these methods in it"),
    ],
)
def test_what_is_no_backbone_is_named(name, message):
    target = f"{__name__}.{name}"
    cfg = OmegaConf.create({"model": {"backbone": {"_target_": target, "weights": None}}})
    with pytest.raises(InputError, match=rf"^model\.backbone\._target_={target}: {message}"):
        family_of(cfg)

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from capo.cli.readiness import check_reward_weights
from capo.errors import InputError
from capo.rewards import Reward, load_rewards
from capo.rewards.sources import check_version
from capo.runtime.fingerprints import content_fingerprint
from fixtures import ROOT
from fixtures.configuration import composed

RED, GRAY = Image.new("RGB", (4, 4), (255, 0, 0)), Image.new("RGB", (4, 4), (51, 51, 51))
built = []


class Redness:
    """Share of red of the first pixel, times `factor`; knows where it was moved to."""

    def __init__(self, factor=1.0, weights=None):
        built.append(factor)
        self.factor, self.device = factor, None

    def to(self, device):
        self.device = device

    def __call__(self, images, prompts):
        assert len(images) == len(prompts)
        red = [image.getpixel((0, 0))[0] / 255 for image in images]
        return torch.tensor(red, dtype=torch.float64) * self.factor


class NeedsMissingModule:
    def __init__(self):
        raise ModuleNotFoundError("No module named 'open_clip'", name="open_clip")


class NeedsMissingWeights:
    def __init__(self):
        raise InputError("no weights at /nowhere: put them there")


class Mute:
    pass


def plain(images, prompts):
    return [0.0] * len(images)


def target(cls=Redness, **arguments):
    return {"_target_": f"{__name__}.{cls.__name__}", **arguments}


def test_score_is_the_scorers_in_float32():
    scores = Reward("red", target(factor=2.0)).score([RED, GRAY], ["a", "b"])
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.tensor([2.0, 2 * 51 / 255]))  # red 255 and 51 of 255


def test_the_scorer_is_built_once_and_late():
    built.clear()
    (reward,) = load_rewards({"red": {"scorer": target(factor=3.0)}})
    assert reward.key.startswith("red-")
    assert built == []
    reward.setup("cpu")
    reward.score([RED], [""])
    reward.score([RED], [""])
    assert built == [3.0]
    assert reward._callable.device == "cpu"


def test_load_keeps_the_order_and_the_facts():
    looks = {"scorer": target(), "link": "identity", "scale": 10, "range": [0, 1], "needs_prompt": False}
    alignment = {"scorer": target(factor=0.5), "link": "log", "license": "MIT", "revision": "v2"}
    loaded = load_rewards({"looks": looks, "alignment": alignment})
    assert [reward.name for reward in loaded] == ["looks", "alignment"]
    for reward, config in zip(loaded, (looks, alignment), strict=True):
        assert {key: getattr(reward, key) for key in config} == config


def test_fingerprint_follows_what_scores_are_made_with():
    base = Reward("red", target(factor=2.0), weights="hub/name", revision="1")
    assert base.key == f"red-{base.fingerprint[:8]}"
    assert Reward("red", target(factor=2.0), "log", 3.0, weights="hub/name", revision="1").key == base.key
    others = [
        Reward("red", target(factor=2.5), weights="hub/name", revision="1"),
        Reward("red", target(factor=2.0), weights="hub/other", revision="1"),
        Reward("red", target(factor=2.0), weights="hub/name", revision="2"),
        Reward("red", target(NeedsMissingModule), weights="hub/name", revision="1"),
    ]
    assert len({reward.fingerprint for reward in [base, *others]}) == 5


def test_fingerprint_of_local_weights_is_their_content(tmp_path):
    def fingerprint(folder, content):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model.safetensors").write_bytes(content)
        path = str(tmp_path / folder)
        return Reward("red", target(weights=path), weights=path).fingerprint

    first, moved, changed = fingerprint("a", b"12"), fingerprint("b", b"12"), fingerprint("c", b"13")
    assert first == moved
    assert first != changed


@pytest.mark.parametrize(
    ("link", "value", "message"),
    [
        (
            "identity",
            float("nan"),
            r'image 1 \("b"\): reward \'red\' is nan, which cannot be compared; check',
        ),
        ("identity", float("inf"), "is inf, which cannot be compared"),
        ("log", -0.25, "is -0.25, which is not a probability"),
        ("log", 1.5, "is 1.5, which is not a probability"),
    ],
)
def test_a_score_that_cannot_be_used_is_named(link, value, message):
    reward = Reward("red", lambda images, prompts: torch.tensor([0.5, value]), link=link)
    with pytest.raises(InputError, match=message):
        reward.score([RED, GRAY], ["a", "b"])
    with pytest.raises(InputError, match=r"^prompt 17, candidate 4: reward 'red'"):
        reward.score([RED, GRAY], ["a", "b"], lambda index: f"prompt 17, candidate {index + 3}")


def test_identity_scores_may_be_negative():
    scores = Reward("red", lambda images, prompts: torch.tensor([-2.0, 7.0])).score([RED, GRAY], ["a", "b"])
    assert scores.tolist() == [-2.0, 7.0]


def test_one_number_an_image():
    reward = Reward("red", lambda images, prompts: torch.zeros(len(images), 1))
    with pytest.raises(InputError, match=r"'red': its .* returned shape \(2, 1\) for 2 images; it must"):
        reward.score([RED, GRAY], ["a", "b"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "rewards: no reward is configured"),
        (
            {"red": {"scorer": {"_target_": "x"}, "lnk": 1}},
            r"rewards\.red: unknown key lnk; known are scorer",
        ),
        (
            {"red": {"scorer": {"_target_": "x"}, "requires": "torch"}},
            r"rewards\.red\.requires=torch: must be a list, requires: \[torch\]",
        ),
        ({"red": {"link": "log"}}, r"rewards\.red: it has no scorer"),
        (
            {"red": {"scorer": {"_target_": "x"}, "link": "logit"}},
            "'red': link 'logit' is unknown; choose one of identity, log",
        ),
        ({"red": {"scorer": {"_target_": "x"}, "scale": -1}}, "'red': scale -1 must be above 0"),
        (
            {"red": {"scorer": {"_target_": "x"}, "weights": "/nowhere/w"}},
            "'red': no weights at /nowhere/w; set",
        ),
        (
            {"red": {"scorer": {"_target_": "x"}, "weights": "./none.pt"}},
            "'red': no weights at ./none.pt; set",
        ),
        (
            {"red": {"scorer": {"_target_": "x"}, "weights": "~/none.pt"}},
            "'red': no weights at ~/none.pt; set",
        ),
        (
            {"red": {"scorer": {"_target_": "x"}, "timeout": 3}},
            r"rewards\.red\.timeout=3: ends a scorer in another process; add isolated: true",
        ),
        (
            {"red": {"scorer": {"_target_": "x"}, "requires": ["no_such_module.part", "nor_this"]}},
            "needs no_such_module.part, nor_this, which is not installed: pip install no_such_module.part "
            "nor_this .or the package",
        ),
        (
            {"red": {"scorer": {"_target_": "x"}, "requires": ["torch>=2"]}},
            r"rewards\.red\.requires=\['torch>=2'\]: must be a list of names of modules, as `import`",
        ),
        (
            {"red": {"scorer": {"_target_": "x"}, "requires": ["torch", "no_such_module"], "extra": "hps"}},
            r"'red' needs no_such_module, which is not installed: pip install 'capo\[hps\]'",
        ),
    ],
)
def test_configs_that_cannot_be_used(config, message):
    with pytest.raises(InputError, match=message):
        load_rewards(config)


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        (target(NeedsMissingModule), r"needs open_clip, which is not installed: pip install 'capo\[clip\]'"),
        (target(NeedsMissingWeights), "^no weights at /nowhere: put them there"),
        (target(facter=1), r"'red': its scorer .*Redness cannot be built \(.*facter"),
        ({"_target_": "capo.no_such.Scorer"}, r"'red': its scorer capo.no_such.Scorer cannot be built"),
        (target(plain), r"plain: missing .*'images'; .* add `_partial_: true`"),
        (target(Mute), r"Mute makes .*, which is not callable; for a function"),
        (target(Redness, _partial_=True), r"Redness is a class, .*: leave out `_partial_: true`"),
    ],
)
def test_scorers_that_cannot_be_built(scorer, message):
    with pytest.raises(InputError, match=message):
        Reward("red", scorer, extra="clip").setup("cpu")


def test_what_a_scorer_reads_is_looked_for_before_it_is_made(tmp_path):
    scorer = {
        "_target_": "capo.rewards.mps.MPS",
        "weights": "owner/name",
        "revision": None,
        "clip": str(tmp_path),
        "clip_revision": "abc",
        "threshold": 0.3,
    }
    [reward] = load_rewards({"mps": {"scorer": scorer}})
    assert reward.sources == {
        "rewards.mps.weights": ("owner/name", None),
        "rewards.mps.scorer.clip": (str(tmp_path), "abc"),
    }
    with pytest.raises(
        InputError, match=r"rewards.mps.weights=owner/name \(revision main\) is not here\n.*HF_HUB_OFFLINE"
    ) as refused:
        check_reward_weights([reward])
    assert "scorer.clip" not in str(refused.value) and "hf download" not in str(refused.value)
    [there] = load_rewards({"mps": {"scorer": scorer | {"weights": str(tmp_path)}}})
    check_reward_weights([there])
    [lost] = load_rewards({"mps": {"scorer": scorer | {"weights": "./gone.safetensors"}}})
    with pytest.raises(
        InputError,
        match=r"rewards.mps.weights=./gone.safetensors: no such file or folder .looked at "
        r"'.*gone.safetensors'",
    ):
        check_reward_weights([lost])


def test_a_long_sentence_with_a_slash_is_no_path():
    reward = Reward("r", {"_target_": "m.C", "question": "yes/no? " * 100})
    other = Reward("r", {"_target_": "m.C", "question": "no/yes? " * 100})
    assert reward.fingerprint != other.fingerprint


def test_a_version_above_1_is_another_reward_and_1_is_none():
    plain = Reward("red", target())
    known = {"scorer": target(), "weights": None, "revision": None}  # what pools of 0.1.0 were keyed by
    assert Reward("red", target(), version=1).fingerprint == plain.fingerprint == content_fingerprint(known)
    assert len({Reward("red", target(), version=number).fingerprint for number in (1, 2, 3)}) == 3


COMMIT, OTHER = "a" * 40, "b" * 40


def unpinned(revision=None, clip_revision=OTHER, **facts):
    scorer = {
        "_target_": "capo.rewards.mps.MPS",
        "weights": "owner/name",
        "revision": revision,
        "clip": "owner/clip",
        "clip_revision": clip_revision,
    }
    return Reward("mps", scorer, weights="owner/name", revision=revision, **facts)


@pytest.fixture
def hub(monkeypatch):
    """Commit of each (repository, revision) that the hub knows; others are unknown."""
    known = {}
    monkeypatch.setattr("capo.rewards.sources.resolved_commit", lambda *asked: known.get(asked))
    return known


def test_an_unpinned_revision_counts_as_the_commit_that_it_stands_for(hub):
    unknown, pinned = unpinned().fingerprint, unpinned(COMMIT).fingerprint
    hub |= {("owner/name", None): COMMIT, ("owner/name", "v1"): COMMIT, ("owner/clip", "main"): COMMIT}
    found = [unpinned().fingerprint, unpinned("v1").fingerprint, unpinned(clip_revision="main").fingerprint]
    hub[("owner/name", None)] = OTHER
    found.append(unpinned().fingerprint)
    assert len({unknown, pinned, *found}) == 6
    hub |= {("owner/name", COMMIT): OTHER, ("owner/clip", OTHER): COMMIT}
    assert unpinned(COMMIT).fingerprint == pinned  # a commit is not asked for
    elsewhere = unpinned(python="/other/python", isolated=True)
    assert elsewhere.fingerprint == unpinned().fingerprint


def test_files_and_scorers_of_others_have_no_commit(hub, tmp_path, monkeypatch):
    hub |= {("owner/name", None): COMMIT}
    assert Reward("own", target(weights="owner/name", revision=None)).commits == {}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert unpinned().commits == {}


def test_the_scorer_reads_the_commit_of_the_fingerprint(hub, monkeypatch):
    built = []
    monkeypatch.setattr("capo.rewards.lookup.build", lambda scorer: built.append(scorer) or Redness())
    hub[("owner/name", None)] = COMMIT
    reward = unpinned()
    assert reward.fingerprint
    hub[("owner/name", None)] = OTHER  # the hub's main moves
    reward.setup("cpu")
    assert (built[0]["revision"], built[0]["clip_revision"]) == (COMMIT, OTHER)


def test_a_configuration_of_another_version_scores_nothing(monkeypatch):
    monkeypatch.setattr("capo.rewards.lookup.build", lambda scorer: Redness())
    scorer = {"_target_": "capo.rewards.hpsv2.HPSv2", "weights": "./w.pt"}
    for version in (1, 3):
        reward = Reward("hpsv2", scorer, version=version)
        assert reward.key  # scores that are there can be read
        with pytest.raises(
            InputError, match=rf"of version {version} of .*; set \+\+rewards\.hpsv2\.version=2"
        ):
            reward.setup("cpu")
    Reward("hpsv2", scorer, version=2).setup("cpu")
    Reward("own", target(), version=7).setup("cpu")  # whose versions are its author's


def test_the_yamls_have_the_versions_of_their_scorers():
    for path in sorted((ROOT / "conf" / "rewards").glob("*.yaml")):
        entries = OmegaConf.to_container(composed(f"rewards={path.stem}").rewards, resolve=True)
        for name, entry in entries.items():
            has = entry.get("version", 1)
            check_version(name, entry["scorer"], has)
            if entry["scorer"]["_target_"].startswith("capo.rewards."):  # others' versions are their authors'
                with pytest.raises(InputError, match=rf"version={has} "):
                    check_version(name, entry["scorer"], has + 1)

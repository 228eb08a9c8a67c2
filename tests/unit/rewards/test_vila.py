"""VILA in a worker, on a stand-in for tensorflow with the published model's signature.

The training process never imports it.
"""

import functools
import importlib.util
import os
import subprocess
import sys
import venv

import pytest
import torch
from omegaconf import OmegaConf

from capo.cli.foreign import check_foreign
from capo.cli.run_changes import differences
from capo.errors import InputError
from capo.rewards import Reward, load_rewards
from capo.rewards.vila import VILA
from fixtures.configuration import composed
from fixtures.tiny_clip import noise_images

# what the adapter uses of tensorflow; a model's folder says in saved_model.pb what it answers
TENSORFLOW = '''
import io, sys, threading
from pathlib import Path
from types import SimpleNamespace


class Array:
    """As much of numpy's as a prediction needs."""

    def __init__(self, values):
        self.values, self.size, self.shape = values, len(values), (1, len(values))

    def reshape(self, *shape):
        return self.values


def mean_level(data):
    """Mean of all levels of a PNG file, over 255."""
    from PIL import Image

    assert data.startswith(b"\\x89PNG")
    levels = Image.open(io.BytesIO(data)).convert("RGB").tobytes()
    return sum(levels) / len(levels) / 255


class Signature:
    def __init__(self, answer):
        self.answer = answer
        self.structured_outputs = {"other" if answer == "other" else "predictions": None}

    meeting = threading.Barrier(4, timeout=240)

    def __call__(self, given):
        if self.answer == "together":
            self.meeting.wait()
        assert given.kind == "tensor" and isinstance(given.value, bytes)
        if self.answer == "modules":
            names = ("torch", "hydra", "capo.rewards")
            found = [sum(10**place for place, name in enumerate(names) if name in sys.modules)]
        else:
            known = {"two": [0.5, 0.6], "nan": [float("nan")], "device": [len(config.seen)]}
            found = known.get(self.answer) or [mean_level(given.value)]
        return {"predictions": SimpleNamespace(numpy=lambda: Array(found))}


def constant(value):
    return SimpleNamespace(kind="tensor", value=value)


def load(folder):
    answer = Path(folder, "saved_model.pb").read_text()
    return SimpleNamespace(signatures={} if answer == "none" else {"serving_default": Signature(answer)})


class Config:
    """Two GPUs, as many of which are seen as asked for."""

    seen, grows = ["gpu0", "gpu1"], []
    experimental = SimpleNamespace(set_memory_growth=lambda gpu, grow: Config.grows.append((gpu, grow)))

    def list_physical_devices(self, kind):
        return ["gpu0", "gpu1"]

    def set_visible_devices(self, devices, kind):
        self.seen = devices


config = Config()
saved_model = SimpleNamespace(load=load)
'''
HUB = """
import tensorflow

def load(handle):
    if "nowhere" in handle:
        raise RuntimeError("no route to host")
    return tensorflow.load(HERE)
"""
IMAGES = noise_images(4)
PROMPTS = ["a", "", "b", "a"]


@pytest.fixture
def tensorflow(tmp_path, monkeypatch):
    """The stand-in, where this interpreter and its workers find it."""
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "tensorflow.py").write_text(TENSORFLOW)
    monkeypatch.syspath_prepend(modules)
    monkeypatch.setenv("PYTHONPATH", str(modules))
    yield modules
    assert "tensorflow" not in sys.modules  # whatever a test did


@pytest.fixture
def model(tmp_path):
    def make(answer="brightness"):
        folder = tmp_path / f"model-{answer}"
        folder.mkdir(exist_ok=True)
        (folder / "saved_model.pb").write_text(answer)
        return str(folder)

    return make


@functools.cache
def shipped():
    return composed("rewards=vila")


def vila(**changes):
    """`rewards` of the configuration, with these keys of the reward in the place of its own."""
    cfg = shipped().copy()
    cfg.rewards.vila.update(changes)
    return OmegaConf.to_container(cfg.rewards, resolve=True)


def expected(image):
    """Mean level over 255."""
    levels = list(image.convert("RGB").tobytes())
    return sum(levels) / len(levels) / 255


def test_scores_are_the_models_predictions_for_the_files_of_the_images(tensorflow, model):
    (reward,) = load_rewards(vila(weights=model()))
    reward.setup("cpu")
    scores = reward.score(IMAGES, PROMPTS)
    assert scores.dtype == torch.float32 and scores.shape == (4,)
    torch.testing.assert_close(scores, torch.tensor([expected(image) for image in IMAGES]), rtol=1e-6, atol=0)
    assert len(set(scores.tolist())) == 4
    assert reward._callable._worker.process.args[0] == sys.executable
    assert reward._callable._worker.process.pid != os.getpid()


def test_a_score_changes_neither_with_its_neighbors_nor_with_their_order_nor_with_prompts(tensorflow, model):
    (reward,) = load_rewards(vila(weights=model()))
    together, order = reward.score(IMAGES, PROMPTS), [2, 0, 3, 1]
    assert torch.equal(reward.score([IMAGES[i] for i in order], ["other"] * 4), together[order])
    assert torch.equal(torch.cat([reward.score([image], [""]) for image in IMAGES]), together)


def test_images_of_a_batch_are_scored_at_once(tensorflow, model):
    """Each of the four calls waits for the other three; scores come back in the order of the images."""
    (reward,) = load_rewards(vila(weights=model("together")))
    (alone,) = load_rewards(vila(weights=model()))
    assert torch.equal(reward.score(IMAGES, PROMPTS), alone.score(IMAGES, PROMPTS))


def test_the_worker_has_tensorflow_and_neither_torch_nor_this_package(tensorflow, model):
    """With this very interpreter, where all of them are installed."""
    (reward,) = load_rewards(vila(weights=model("modules")))
    assert reward.score(IMAGES[:1], [""]).tolist() == [0]  # 1 for torch, 10 for hydra, 100 for capo.rewards


def test_importing_the_adapter_imports_nothing_heavy():
    """As the worker does: its file alone."""
    code = (
        f"import sys, importlib.util as u; s = u.spec_from_file_location('v', "
        f"{sys.modules[VILA.__module__].__file__!r})"
        "; m = u.module_from_spec(s); s.loader.exec_module(m); m.VILA('https://x')"
        "; print([n for n in ('torch', 'tensorflow', 'capo', 'numpy', 'PIL') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_another_environments_interpreter(tensorflow, model, tmp_path):
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    (reward,) = load_rewards(vila(weights=model("modules"), python=str(python)))
    assert reward.score(IMAGES[:1], [""]).tolist() == [0]
    assert reward._callable._worker.process.args[0] == str(python)
    (here,) = load_rewards(vila(weights=model("modules")))
    assert here.key == reward.key


def test_without_tensorflow_the_extra_and_the_other_way_are_named(model, tmp_path):
    with pytest.raises(InputError) as refused:
        load_rewards(vila(weights=model()))
    assert str(refused.value) == (
        "reward 'vila' needs tensorflow, which is not installed: pip install 'capo[vila]', or give the "
        "interpreter of an environment "
        "that has it: ++rewards.vila.python=/path/to/env/bin/python"
    )
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    with pytest.raises(
        InputError,
        match=f"'vila' needs tensorflow, which {python} cannot import: {python} -m pip install tensorflow",
    ):
        load_rewards(vila(weights=model(), python=str(python)))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            "none",
            "ValueError: weights=.*another model's: it has no signature serving_default that gives "
            "predictions; .*google/vila/image/1",
        ),
        ("other", "another model's: it has no signature serving_default that gives predictions"),
    ],
)
def test_another_models_weights_are_refused_before_any_image(tensorflow, model, answer, message):
    (reward,) = load_rewards(vila(weights=model(answer)))
    with pytest.raises(InputError, match=message):
        reward.setup("cpu")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            "two",
            r"the model gave 2 numbers per image, of shape \(1, 2\); this reward reads google/vila/image/1",
        ),
        ("nan", r'image 0 \("a"\): reward \'vila\' is nan, which cannot be compared'),
    ],
)
def test_answers_that_are_no_scores(tensorflow, model, answer, message):
    (reward,) = load_rewards(vila(weights=model(answer)))
    with pytest.raises(InputError, match=message):
        reward.score(IMAGES, PROMPTS)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            "{tmp}",
            "that folder holds no saved_model.pb; give the unpacked folder of google/vila/image/1 .*kaggle",
        ),
        (
            "google/vila/image/1",
            "not a folder, and not a handle such as https://tfhub.dev/google/vila/image/1",
        ),
    ],
)
def test_weights_that_are_none(tensorflow, weights, message, tmp_path):
    (reward,) = load_rewards(vila(weights=weights.format(tmp=tmp_path)))
    with pytest.raises(InputError, match=message):
        reward.setup("cpu")


def test_a_handle_is_downloaded_by_tensorflow_hub(tensorflow, model):
    (reward,) = load_rewards(vila())
    assert reward.weights == "https://tfhub.dev/google/vila/image/1"
    with pytest.raises(
        InputError,
        match=r"'vila' needs tensorflow_hub, which .* cannot import: .* -m pip install tensorflow_hub",
    ):
        reward.setup("cpu")
    (tensorflow / "tensorflow_hub.py").write_text(HUB.replace("HERE", repr(model())))
    reward.setup("cpu")
    assert reward.score(IMAGES[:1], [""]).item() == pytest.approx(expected(IMAGES[0]))
    (reward,) = load_rewards(vila(weights="https://nowhere/1"))
    with pytest.raises(
        InputError,
        match=r"weights=https://nowhere/1 are not available .no route to host.; "
        r".*https://www.kaggle.com/models/google/vila.*rewards.vila.weights=FOLDER",
    ):
        reward.setup("cpu")


@pytest.mark.parametrize(("device", "seen"), [("cpu", 0), ("cuda", 1), ("cuda:1", 1), ("cuda:2", 0)])
def test_it_takes_one_gpu_and_none_on_the_cpu(tensorflow, model, device, seen):
    (reward,) = load_rewards(vila(weights=model("device")))
    reward.setup(device)
    assert reward.score(IMAGES[:1], [""]).item() == seen


def test_of_several_gpus_it_sees_the_one_it_is_given_and_grows(tensorflow, monkeypatch, model):
    """In this process, to look inside."""
    spec = importlib.util.spec_from_file_location("stand_in", tensorflow / "tensorflow.py")
    stand_in = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stand_in)
    with monkeypatch.context() as here:
        here.setitem(sys.modules, "tensorflow", stand_in)
        VILA(model()).to("cuda:1")
    assert stand_in.config.seen == ["gpu1"] and stand_in.Config.grows == [("gpu1", True)]


def test_a_callable_of_this_process_cannot_be_isolated():
    with pytest.raises(InputError, match="isolated=true needs a scorer that is named"):
        Reward("mine", lambda images, prompts: None, isolated=True)


def test_where_it_runs_is_no_difference_of_runs(tmp_path):
    old, new = (
        {"rewards": vila(**changes)}
        for changes in ({}, {"python": "/envs/tf/bin/python", "isolated": False, "timeout": 7})
    )
    assert differences(old, new) == []
    check_foreign(tmp_path, old, [])
    check_foreign(tmp_path, new, ["/envs/tf/bin/python"])
    with pytest.raises(
        InputError, match=r"rewards.vila.python=/envs/tf/bin/python; .*trust=\[/envs/tf/bin/python\]"
    ):
        check_foreign(tmp_path, new, [])

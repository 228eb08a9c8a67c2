"""What scorers of others return, raise and leave behind, in this process and in one of their own."""

import io
import os
import random
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from capo.backbones.sampling import SamplerSettings
from capo.data.generation import ImageGenerator, PoolSpec, fill_pool
from capo.data.prompts import make_prompt
from capo.errors import InputError
from capo.rewards import Reward, load_rewards
from capo.rewards.guard import NoScores, numbers, scores, undisturbed
from fixtures.fake_backbone import FakeBackbone

TWO = [Image.new("RGB", (4, 3), (255, 0, 0)), Image.new("RGB", (5, 2), (51, 102, 153))]
ODD_SCORERS = '''
import os, sys


def says(images, prompts, value=None):
    return value


def generates(images, prompts):
    return (index / 2 for index in range(len(images)))


def complexes(images, prompts):
    return [1j] * len(images)


def leaves(images, prompts):
    raise GeneratorExit


def exits(images, prompts, code=0):
    sys.exit(code)


def ends(images, prompts, code=0):
    os._exit(code)


def forks(images, prompts):
    """The exit code of a process that it starts."""
    child = os.fork()
    if not child:
        os._exit(7)
    return [float(os.WEXITSTATUS(os.waitpid(child, 0)[1]))] * len(images)


class Speechless(Exception):
    def __str__(self):
        raise ValueError("no text")


def speechless(images, prompts):
    raise Speechless


def raises(images, prompts):
    raise KeyError("no such token\\nand more")


class Wanders:
    """Leaves the working directory and closes the streams wherever it is called."""

    def __init__(self, folder, when):
        self.folder, self.when = folder, when
        self.act("make")

    def act(self, now):
        if now == self.when:
            os.chdir(self.folder)
            os.close(0)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.stderr = None

    def __call__(self, images, prompts):
        self.act("call")
        return [float(len(prompt)) for prompt in prompts]


class Where:
    """1 where it is called in the working directory, streams open, in which it was made."""

    def __init__(self, folder, when):
        self.here, self.wanders = os.getcwd(), Wanders(folder, when)

    def __call__(self, images, prompts):
        there = [os.getcwd() == self.here, sys.stderr is not None, os.fstat(0).st_ino > 0]
        return [sum(there) + 0 * score for score in self.wanders(images, prompts)]
'''


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    (folder / "odd_scorers.py").write_text(ODD_SCORERS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        yield folder
        sys.modules.pop("odd_scorers", None)


@pytest.fixture(scope="module", params=["here", "isolated"])
def odd(request, module, tmp_path_factory):
    """Makes a reward with one of the scorers above, in this process or in one of its own."""
    made, logs = [], tmp_path_factory.mktemp("logs")

    def make(name, **arguments):
        scorer = {"_target_": f"odd_scorers.{name}", **arguments}
        if name[0].islower():
            scorer["_partial_"] = True
        entry = {"scorer": scorer, "isolated": request.param == "isolated", "timeout": 120}
        made.extend(load_rewards({"odd": entry}, logs=logs))
        return made[-1]

    yield make
    for reward in made:
        reward.give_up()


@pytest.mark.parametrize(("name", "arguments", "message"), [
    ("says", {"value": [0.5]}, "returned 1 values for 2 images; it must return one real number per image"),
    ("says", {"value": [1.0, "good"]}, "returned 'good' for image 1 of the batch; it must return one real"),
    ("says", {"value": "ab"}, "returned 'ab' for 2 images"),
    ("says", {"value": {"a": 1, "b": 2}}, "returned {'a': 1, 'b': 2} for 2 images"),
    ("says", {"value": [[1.0], [2.0, 3.0]]}, r"returned \[1.0\] for image 0 of the batch"),
    ("says", {"value": 0.5}, "returned 0.5 for 2 images"),
    ("says", {"value": [1.0, None]}, "returned None for image 1 of the batch"),
    ("complexes", {}, "returned 1j for image 0 of the batch"),
    ("leaves", {}, r"failed: RuntimeError: GeneratorExit; the traceback is in \S+odd\.log$"),
    ("exits", {}, r"failed: SystemExit: 0; the traceback is in \S+odd\.log$"),
    ("exits", {"code": "no weights"}, r"failed: SystemExit: no weights; the traceback is in \S+odd\.log$"),
    ("ends", {}, r"failed: RuntimeError: it called os._exit\(0\), which would end this process; the trace"),
    ("speechless", {}, r"failed: .*Speechless: <exception str\(\) failed>; the traceback is in \S+odd\.log$"),
    ("raises", {}, r"failed: KeyError: 'no such token\\nand more'; the traceback is in \S+odd\.log$"),
])  # fmt: skip
def test_what_is_no_score_is_named_with_reward_and_batch(odd, name, arguments, message):
    reward = odd(name, **arguments)
    place = r'^image 0 \("a"\) to image 1 \("b"\): reward \'odd\': its scorer odd_scorers.'
    with pytest.raises(InputError, match=f"{place}{name}.*{message}") as refused:
        reward.score(TWO, ["a", "b"])
    if "traceback" in message:
        told = Path(str(refused.value).rpartition(" ")[2]).read_text()
        assert f"in {name}\n" in told and told.startswith("---")


def test_a_generator_of_numbers_is_a_list_of_them(odd):
    assert odd("generates").score(TWO, ["a", "b"]).tolist() == [0.0, 0.5]


class Draws:
    """Paints over the images that it gets, and empties the lists."""

    def __call__(self, images, prompts):
        count = len(images)
        for image in images:
            image.paste((0, 0, 0), (0, 0, 99, 99))
        images.clear(), prompts.clear()
        return [0.5] * count

    def features(self, images):
        return torch.tensor(self(images, []))[:, None]


def test_a_scorer_that_draws_on_images_draws_on_its_own():
    images, prompts = [image.copy() for image in TWO], ["a", "b"]
    reward = Reward("draws", scorer=Draws())
    assert reward.score(images, prompts).tolist() == [0.5, 0.5]
    assert reward.features(images).shape == (2, 1)
    assert images == TWO and prompts == ["a", "b"]


def test_what_features_raise_is_named_with_the_reward(tmp_path):
    class Fails(Draws):
        def features(self, images):
            os.chdir(tmp_path)
            raise KeyError("no such layer")

    before = Path.cwd()
    with pytest.raises(InputError, match=r"reward 'fails': its scorer .* its method `features`: KeyError"):
        Reward("fails", scorer=Fails(), logs=tmp_path).features(TWO)
    assert Path.cwd() == before


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            torch.tensor([[0.0, 1.0], [2.0, torch.nan]]),
            "nan at place 1 of the vector for image 1 of the batch",
        ),
        (torch.full((2, 1), 1e300, dtype=torch.float64), "inf at place 0 of the vector for image 0"),
        (torch.zeros(2), r"shape \(2,\) for 2 images"),
        (torch.zeros(3, 4), r"shape \(3, 4\) for 2 images"),
        (torch.zeros(2, 0), r"shape \(2, 0\)"),
        (torch.zeros(2, 4, dtype=torch.complex64), r"tensor\(\[\[0\.\+0\.j"),
        (torch.zeros(2, 4, device="meta"), r"tensor\(\.\.\., device='meta'"),
        ([["a"], ["b"]], r"\[\['a'\], \['b'\]\] for 2 images"),
        ([[1.0], [2.0, 3.0]], r"\[\[1.0\], \[2.0, 3.0\]\] for 2 images"),
        (None, "None for 2 images"),
    ],
)
def test_what_is_no_vector_is_named_with_the_reward(value, message):
    class Says(Draws):
        def features(self, images):
            return value

    must = r"its method `features` must return a finite vector per image: .* \(B, D\)$"
    with pytest.raises(InputError, match=rf"^reward 'says': its scorer \S+Says returned {message}.*; {must}"):
        Reward("says", scorer=Says()).features(TWO)


@pytest.mark.parametrize("kind", [np.array, torch.tensor, list, lambda rows: torch.tensor(rows).bfloat16()])
def test_vectors_are_single_precision_without_gradients(kind):
    class Says(Draws):
        def features(self, images):
            assert not torch.is_grad_enabled()
            return kind([[0.5, 2.0]] * len(images))

    found = Reward("says", scorer=Says()).features(TWO)
    assert found.dtype == torch.float32 and found.tolist() == [[0.5, 2.0]] * 2


def test_files_after_a_scorer_have_the_permissions_that_they_had_before(tmp_path):
    def hides(images, prompts):
        os.umask(0o777)
        return [0.5] * len(images)

    (tmp_path / "before").touch()
    Reward("hides", scorer=hides).score(TWO, ["a", "b"])
    (tmp_path / "after").touch()
    assert (tmp_path / "after").stat().st_mode == (tmp_path / "before").stat().st_mode


def test_a_module_that_is_no_python_is_named_with_its_line(tmp_path, monkeypatch):
    (tmp_path / "broken_scorer.py").write_text("def score(images, prompts):\n    return [0.5])\n")
    monkeypatch.syspath_prepend(tmp_path)
    broken = Reward("broken", scorer={"_target_": "broken_scorer.score"}, logs=tmp_path)
    message = r"cannot be built \(SyntaxError: unmatched '\)' in \S+/broken_scorer.py, line 2\); correct it"
    with pytest.raises(InputError, match=message):
        broken.setup("cpu")


def test_a_scorer_may_end_processes_that_it_starts(odd):
    before = os._exit
    assert odd("forks").score(TWO, ["a", "b"]).tolist() == [7.0, 7.0]
    assert os._exit is before


@pytest.mark.parametrize("when", ["make", "call"])
def test_a_scorer_that_wanders_leaves_its_process_where_it_was(odd, when, tmp_path, capfd):
    before, error = os.getcwd(), sys.stderr
    reward = odd("Where", folder=str(tmp_path), when=when)
    reward.setup("cpu")
    for _ in range(2):  # the second call finds the process as the first did
        assert reward.score(TWO, ["a", "b"]).tolist() == [3.0, 3.0]
    assert os.getcwd() == before and sys.stderr is error
    assert os.fstat(0)
    os.write(1, b"seen\n")
    assert capfd.readouterr().out == "seen\n"


def test_files_of_a_pool_lie_where_they_belong_whatever_its_scorer_does(odd, tmp_path, monkeypatch):
    """The root is relative to a working directory that the scorer leaves before scores are written."""
    (tmp_path / "work").mkdir()
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    prompts = [make_prompt(text) for text in ("a red circle", "a blue square")]
    spec = PoolSpec(Path("pools"), "tiny", "train", 5, prompts, candidates=2, prompts_per_shard=2)
    reward = odd("Wanders", folder=str(tmp_path / "away"), when="call")
    settings = SamplerSettings(steps=2, guidance=3.0, batch=3)
    pool = fill_pool(spec, ImageGenerator.base(FakeBackbone(), settings), [reward], progress=False)
    assert not any((tmp_path / "away").rglob("*"))
    assert [*(tmp_path / "work" / pool.folder / "scores").rglob("*.parquet")]


def raised(result, count=2):
    with pytest.raises(NoScores) as refused:
        numbers(result, count)
    return str(refused.value)


def test_arrays_and_tensors_are_checked_by_shape_and_dtype():
    assert numbers(torch.tensor([1, 2]), 2) == numbers(np.array([1.0, 2.0]), 2) == [1.0, 2.0]
    assert numbers(torch.tensor([0.1], dtype=torch.bfloat16, requires_grad=True), 1) == [0.10009765625]
    assert numbers([torch.tensor(1.5), np.float32(2.5)], 2) == [1.5, 2.5]
    assert numbers(torch.tensor([True, False]), 2) == [1.0, 0.0]
    assert np.isnan(numbers(np.array([np.nan]), 1)).all()  # which image it is, `Reward.score` says
    assert "returned shape (2, 1) for 2 images" in raised(torch.zeros(2, 1))
    assert "returned shape () for 1 images" in raised(torch.tensor(1.0), 1)
    assert "returned shape (3,) for 2 images" in raised(np.zeros(3))
    assert "returned 1j for image 0" in raised(torch.tensor([1j, 0]))
    assert "returned tensor(1.+0.j) for image 0" in raised([torch.tensor(1 + 0j), 1.0])
    assert "which holds no numbers (" in raised(torch.zeros(2, device="meta"))
    assert "returned '0.5' for image 0" in raised(np.array(["0.5", "1"]))
    assert "returned {1.0, 2.0} for 2 images" in raised({1.0, 2.0})
    assert "for image 1 of the batch" in raised([1.0, 10**400])
    assert len(raised("x" * 10**6)) < 400


def test_a_score_beyond_float32_cannot_be_compared():
    with pytest.raises(InputError, match="is inf, which cannot be compared"):
        Reward("large", lambda images, prompts: [1e39] * len(images)).score(TWO, ["a", "b"])
    with pytest.raises(InputError, match=r"is -\S+e\+18, which cannot be compared"):
        Reward("large", lambda images, prompts: [-2e18] * len(images)).score(TWO, ["a", "b"])


def state():
    return (
        random.random(),
        np.random.rand(),
        torch.rand(1).item(),
        torch.get_default_dtype(),
        torch.zeros(1).device.type,
        torch.is_grad_enabled(),
        torch.get_num_threads(),
    )


def seed(number):
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def unsettle(images, prompts):
    seed(7)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_grad_enabled(False)
    torch.set_num_threads(torch.get_num_threads() + 1)
    return [0.0] * len(images)


class UnsettlesWhenMade:
    def __init__(self):
        unsettle([], [])

    def to(self, device):
        unsettle([], [])

    def __call__(self, images, prompts):
        return unsettle(images, prompts)


def test_torch_and_random_generators_are_as_before():
    made = Reward("made", {"_target_": f"{__name__}.UnsettlesWhenMade"})
    works = [
        lambda: Reward("called", unsettle).score(TWO, ["a", "b"]),
        lambda: made.setup("cpu"),
        lambda: made.score(TWO, ["a", "b"]),
        made.offload,
    ]
    for work in works:
        seed(3)
        expected = state()
        seed(3)
        work()
        assert state() == expected


def test_side_by_side_the_last_one_puts_back_what_threads_share(tmp_path):
    """The first one leaves while the second has changed the directory: the second leaves it as it was."""
    before, entered, left = os.getcwd(), threading.Event(), threading.Event()

    def second():
        with undisturbed():
            os.chdir(tmp_path)
            entered.set()
            left.wait(60)

    thread = threading.Thread(target=second)
    with undisturbed():
        thread.start()
        assert entered.wait(60)
    assert os.getcwd() == str(tmp_path)
    left.set()
    thread.join()
    assert os.getcwd() == before


def test_a_stream_that_is_closed_is_opened_again(monkeypatch, capfd):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO()))
    Reward("shuts", lambda images, prompts: [sys.stdout.close() or 0.0] * len(images)).score(TWO[:1], [""])
    print("seen", flush=True)
    assert capfd.readouterr().out == "seen\n"


def test_a_signal_that_ends_the_process_is_no_fault_of_a_scorer():
    """Lightning raises a class of its own on SIGTERM, wherever the process is."""

    class Ended(SystemExit):
        pass

    def scorer(images, prompts):
        raise Ended

    with pytest.raises(Ended):
        Reward("ended", scorer).score(TWO, ["a", "b"])
    with pytest.raises(KeyboardInterrupt):
        Reward("typed", interrupted).score(TWO, ["a", "b"])


def interrupted(images, prompts):
    raise KeyboardInterrupt


def test_a_log_that_cannot_be_written_costs_no_message(tmp_path):
    (tmp_path / "file").touch()

    def scorer(images, prompts):
        raise KeyError("token")

    reward = Reward("lost", scorer, logs=tmp_path / "file")
    with pytest.raises(
        InputError, match=r"failed: KeyError: 'token'; the traceback could not be written to .*lost.log"
    ):
        reward.score(TWO, ["a", "b"])


def test_a_scorer_that_was_not_built_is_not_built_to_be_moved_away():
    reward = Reward("odd", {"_target_": f"{__name__}.NoneSuch"})
    reward.offload()
    reward.give_up()
    with pytest.raises(InputError, match="cannot be built"):
        reward.setup("cpu")
    reward.offload()


def test_variables_and_handlers_are_as_before(monkeypatch):
    monkeypatch.setenv("CAPO_KEPT", "1")
    monkeypatch.setenv("CAPO_REMOVED", "2")
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def scorer(images, prompts):
        os.environ.update(CAPO_KEPT="3", CAPO_ADDED="4")
        del os.environ["CAPO_REMOVED"]
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        return [0.0 for _ in images]

    before = dict(os.environ)
    try:
        assert scores(scorer, [b"x"], ["a"]) == [0.0]
        assert dict(os.environ) == before
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers, strict=True):
            signal.signal(number, handler)
        os.environ.pop("CAPO_ADDED", None)


@pytest.mark.parametrize("error", [ValueError, SystemExit, None])
def test_a_process_that_a_scorer_forks_does_not_go_on_as_this_one(error):
    number = os.getpid()

    def splits(images, prompts):
        if child := os.fork():
            return [float(os.WEXITSTATUS(os.waitpid(child, 0)[1]))]
        if error:
            raise error
        return [0.5]

    try:
        assert scores(splits, TWO[:1], ["a"]) == [1.0]
    finally:
        if os.getpid() != number:
            os._exit(9)

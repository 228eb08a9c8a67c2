"""Scorers in another environment.

A real one without torch, and workers that die, hang, or answer nonsense.
"""

import ast
import io
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import PIL
import pytest
import torch
from PIL import Image

from capo.backbones.sampling import SamplerSettings
from capo.data.generation import ImageGenerator, PoolSpec, fill_pool
from capo.data.prompts import make_prompt
from capo.errors import InputError
from capo.rewards import Reward, guard, load_rewards, lookup, worker
from capo.rewards import isolated as isolated_side
from capo.rewards.isolated import IsolatedScorer
from capo.rewards.logs import log_file, write_traceback
from fixtures.fake_backbone import FakeBackbone

RED, DARK = Image.new("RGB", (4, 3), (255, 0, 0)), Image.new("RGB", (5, 2), (51, 102, 153))
TARGETS = '''
import ctypes, importlib.util, os, signal, struct, sys, time
from pathlib import Path


class Redness:
    """Red of the first pixel and the prompt's length; says aloud what it does."""

    def __init__(self, factor=1.0, pids=None):
        print("made with", factor)
        self.factor = factor
        if pids:
            with open(pids, "a") as file:
                file.write(f"{os.getpid()}\\n")

    def __call__(self, images, prompts):
        print("scoring", len(images))
        pairs = zip(images, prompts)
        return [image.getpixel((0, 0))[0] / 255 * self.factor + len(prompt) for image, prompt in pairs]


def size(images, prompts, unit=1):
    """Width and height as they stand in a PNG's header, read by hand."""
    return [unit * (1000 * w + h) for w, h in (struct.unpack(">II", image[16:24]) for image in images)]


size.takes = "png"


class Sees:
    """Which of some modules can be imported here."""

    takes = "png"

    def __init__(self, *modules):
        self.modules = modules

    def __call__(self, images, prompts):
        found = sum(10**place for place, name in enumerate(self.modules) if importlib.util.find_spec(name))
        return [found] * len(images)


class Dies(Redness):
    """Ends its process, as a crash in C would, at the first `times` calls: each leaves a mark in a folder."""

    def __init__(self, folder, times, where="call", code=None):
        super().__init__()
        self.folder, self.times, self.where, self.code = Path(folder), times, where, code
        self.die("make")

    def die(self, where):
        marks = len(list(self.folder.iterdir()))
        if where == self.where and marks < self.times:
            (self.folder / str(marks)).touch()
            if self.code is None:
                os.kill(os.getpid(), signal.SIGSEGV)
            ctypes.CDLL(None)._exit(self.code)

    def __call__(self, images, prompts):
        self.die("call")
        return super().__call__(images, prompts)


class Sleeps(Redness):
    def __call__(self, images, prompts):
        time.sleep(1000 if "hang" in prompts else 0)
        return super().__call__(images, prompts)


def spoken(images, prompts, value=None):
    return value


def raises(images, prompts):
    raise KeyError("no such token")


class OutOfMemoryError(RuntimeError):
    pass


def greedy(images, prompts):
    raise OutOfMemoryError("tried to allocate 9 GiB")


class Scribbles:
    """Writes into every open pipe, as a library that does not know what is there might."""

    takes = "png"

    def __call__(self, images, prompts):
        for number in range(3, 20):
            try:
                os.write(number, b"Loading weights: 100%")
            except OSError:
                pass
        return [0.0] * len(images)


class Moved(Redness):
    def to(self, device):
        self.factor = {"cpu": 1, "meta": 2}[device]


def lacking(images, prompts):
    import no_such_module
'''


@pytest.fixture(scope="session")
def bare(tmp_path_factory):
    """The interpreter of an environment with nothing in it."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    return str(folder / "bin" / "python")


@pytest.fixture(scope="session")
def pillow_only(tmp_path_factory):
    """The interpreter of an environment with Pillow, and without torch."""
    folder = tmp_path_factory.mktemp("pillow")
    venv.create(folder, with_pip=False, symlinks=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    own = Path(PIL.__file__).parents[1]
    for name in ("PIL", "pillow.libs"):
        if (own / name).exists():
            (packages / name).symlink_to(own / name)
    return str(folder / "bin" / "python")


@pytest.fixture(scope="session")
def targets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("targets")
    (folder / "their_reward.py").write_text(TARGETS)
    return folder


@pytest.fixture
def isolated(targets, pillow_only, monkeypatch, tmp_path):
    """Makes scorers in the environment without torch, or in `python`; ends their workers."""
    monkeypatch.setenv("PYTHONPATH", str(targets))
    made = []

    def make(name, python=pillow_only, timeout=120, **arguments):
        scorer = {"_target_": f"their_reward.{name}", **arguments}
        made.append(IsolatedScorer("theirs", python, scorer, timeout, tmp_path / "logs" / "theirs.log"))
        return made[-1]

    yield make
    for scorer in made:
        scorer.close()


def gone(pid, seconds=120):
    """Whether the process ends; one that nobody has waited for yet counts as ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False


def test_a_message_comes_back_as_it_was_sent():
    stream = io.BytesIO()
    worker.send(stream, {"prompts": ["é\ud800", 'a "b"\n']}, [b"", b"\x00CAPO"])
    worker.send(stream, {"score": 0.1})
    stream.seek(0)
    assert worker.receive(stream) == ({"prompts": ["é\ud800", 'a "b"\n']}, [b"", b"\x00CAPO"])
    assert worker.receive(stream) == ({"score": 0.1}, [])
    with pytest.raises(EOFError):
        worker.receive(stream)


@pytest.mark.parametrize(
    ("text", "most", "message"),
    [
        (b"[]", None, "without the sizes"),
        (b"{}", None, "without the sizes"),
        (b'{"sizes": 3}', None, "without the sizes"),
        (b'{"sizes": [-1]}', None, "without the sizes"),  # would read to the end of the stream
        (b'{"sizes": [true]}', None, "without the sizes"),
        (b'{"sizes": [2.0]}', None, "without the sizes"),
        (b'{"sizes": [3, 4]}', 6, "7 bytes after the header, above 6"),
        (b'{"sizes": ', None, "Expecting value"),
    ],
)
def test_a_message_with_other_sizes_is_none(text, most, message):
    stream = io.BytesIO(worker.START.pack(worker.MAGIC, len(text)) + text + b"1234567")
    with pytest.raises(ValueError, match=message):
        worker.receive(stream, most)


def test_a_header_that_is_too_long_is_not_read():
    with pytest.raises(ValueError, match="a header of 4294967295 bytes, above"):
        worker.receive(io.BytesIO(worker.START.pack(worker.MAGIC, 2**32 - 1)))


@pytest.mark.parametrize(
    ("shapes", "pixels", "message"),
    [
        (None, [b"rgb"], "1 images with the shapes None"),
        ([[1, 1], [1, 1]], [b"rgb"], "1 images with the shapes"),
        ([[1, 1], [1, 1]], [b"rgb", b"rgb"], "2 images for 1 prompts"),
        ([[1, 2]], [b"rgb"], "an image of 1 x 2 pixels in 3 bytes"),
        ([[-1, -1]], [b"rgb"], r"shape \[-1, -1\], which is not \[width, height\]"),
        ([[1, 1, 3]], [b"rgb"], "which is not"),
        ([[1.0, 1]], [b"rgb"], "which is not"),
    ],
)
def test_pixels_of_another_shape_are_refused(shapes, pixels, message):
    service = worker.Service()
    service.scorer = lambda images, prompts: [0.0] * len(images)
    header = {"prompts": ["a"]} if shapes is None else {"prompts": ["a"], "shapes": shapes}
    found = service.answer(header, pixels)
    assert found["kind"] == "ValueError" and re.search(message, found["error"])


def test_a_scorer_of_pil_images_gets_their_pixels_unpacked(isolated, pillow_only, monkeypatch):
    """No file is packed, whatever the image's mode; a scorer that takes PNG gets one for each image."""
    packed = []
    pack = isolated_side._png
    monkeypatch.setattr(isolated_side, "_png", lambda image: packed.append(image) or pack(image))
    gray = Image.new("L", (3, 5), 102)
    assert isolated("Redness")([RED, gray], ["", "a"]).tolist() == [1.0, 1.4]
    assert not packed
    assert isolated("size", _partial_=True)([RED, gray], ["", ""]).tolist() == [4003, 3005]
    assert len(packed) == 2


def test_the_worker_needs_the_standard_library_of_an_old_python_only():
    for module in (worker, guard, lookup):
        tree = ast.parse(Path(module.__file__).read_text(), feature_version=(3, 7))
        imported = {
            name.name.split(".")[0]
            for node in tree.body
            if isinstance(node, ast.Import)
            for name in node.names
        }
        imported |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
        assert imported <= sys.stdlib_module_names


def test_a_scorer_where_torch_is_not_installed(bare, isolated):
    sees = isolated("Sees", bare, _args_=["torch", "PIL", "json"])
    assert sees([RED, DARK], ["a", "b"]).tolist() == [
        100,
        100,
    ]  # neither torch (1) nor PIL (10), but json (100)
    assert isolated("size", bare, _partial_=True, unit=2)([RED, DARK], ["", ""]).tolist() == [8006, 10004]
    with pytest.raises(
        InputError, match=rf"'theirs' needs PIL, which {bare} cannot import: {bare} -m pip install PIL"
    ):
        isolated("Redness", bare)([RED], [""])


def test_scores_are_those_of_the_scorer_in_this_process(isolated, targets, monkeypatch, pillow_only):
    monkeypatch.syspath_prepend(targets)
    assert isolated("Sees", _args_=["torch", "PIL"])([RED], [""]).tolist() == [10]
    config = {"scorer": {"_target_": "their_reward.Redness", "factor": 0.3}}
    (here,) = load_rewards({"theirs": config})
    (there,) = load_rewards({"theirs": config | {"python": pillow_only, "requires": ["PIL"]}})
    assert here.key == there.key  # where it runs moves no score
    for reward in (here, there):
        reward.setup("cpu")
    images, prompts = [RED, DARK.convert("L").convert("RGB"), DARK], ["a", "", "ümlaut"]
    assert torch.equal(there.score(images, prompts), here.score(images, prompts))
    assert there._callable._worker.process.args[0] == pillow_only


def test_what_a_scorer_prints_is_in_its_log(isolated):
    scorer = isolated("Redness", factor=2)
    assert scorer([DARK], ["ab"]).tolist() == [2.4]  # 51 / 255 x 2 + 2
    scorer.close()
    lines = scorer.log_file.read_text().splitlines()
    assert lines[0].startswith("--- ")
    assert lines[1:] == ["made with 2", "scoring 1"]


def test_a_scorer_is_told_its_device(isolated):
    scorer = isolated("Moved")
    scorer.to("meta")
    assert scorer([RED], [""]).item() == 2
    scorer.to(torch.device("cpu"))
    assert scorer([RED], [""]).item() == 1


@pytest.mark.parametrize("where", ["call", "make"])
def test_a_worker_that_dies_once_is_started_again(where, isolated, tmp_path, caplog):
    (tmp_path / "marks").mkdir()
    scorer = isolated("Dies", folder=str(tmp_path / "marks"), times=1, where=where)
    with caplog.at_level(logging.WARNING):
        assert scorer([RED, DARK], ["a", "abc"]).tolist() == [2, 3.2]
    assert [record.message.split(";")[0].split(" and ")[0] for record in caplog.records] == [
        "reward 'theirs': its worker died (exit code -11)"
    ]


@pytest.mark.parametrize("where", ["call", "make"])
def test_one_that_dies_twice_is_an_error(where, isolated, tmp_path):
    (tmp_path / "marks").mkdir()
    scorer = isolated("Dies", folder=str(tmp_path / "marks"), times=2, where=where)
    with pytest.raises(
        InputError,
        match=r"its scorer their_reward\.Dies in .* died 2 times in a row \(exit code -11\).*theirs\.log",
    ):
        scorer([RED], ["a"])
    assert scorer([RED], ["a"]).tolist() == [2]  # it has two lives again


@pytest.mark.parametrize("code", [0, 3])
def test_one_that_ends_by_itself_is_not_started_again(code, isolated, tmp_path):
    (tmp_path / "marks").mkdir()
    scorer = isolated("Dies", folder=str(tmp_path / "marks"), times=9, code=code)
    with pytest.raises(InputError, match=rf"ended its process \(exit code {code}\); .*theirs\.log"):
        scorer([RED], ["a"])
    assert len(list((tmp_path / "marks").iterdir())) == 1


def test_one_that_hangs_is_ended(isolated):
    scorer = isolated("Sleeps", timeout=120)
    scorer.to("cpu")
    pid, scorer.timeout = scorer._worker.process.pid, 0.5
    with pytest.raises(
        InputError, match=r"gave no answer in 0\.5 s and was ended.*\+\+rewards\.theirs\.timeout=SECONDS"
    ):
        scorer([RED], ["hang"])
    assert gone(pid)
    scorer.timeout = 120
    assert scorer([RED], ["a"]).tolist() == [2]


@pytest.mark.parametrize(
    ("target", "arguments", "message"),
    [
        ("spoken", {"value": [1.0]}, "returned 1 values for 2 images; it must return one real number"),
        ("raises", {}, "failed: KeyError: 'no such token'; the traceback is in .*theirs.log"),
        (
            "lacking",
            {},
            "needs no_such_module, which .* cannot import: .* -m pip install no_such_module .*theirs.log",
        ),
        (
            "greedy",
            {},
            "ran out of memory .their_reward.OutOfMemoryError: tried to allocate 9 GiB.; see .*theirs.log$",
        ),
    ],
)
def test_answers_that_are_no_scores(target, arguments, message, isolated):
    scorer = isolated(target, _partial_=True, **arguments)
    with pytest.raises(InputError, match=message) as caught:
        scorer([RED, DARK], ["a", "b"])
    assert isinstance(caught.value, torch.OutOfMemoryError) == (target == "greedy")
    if "traceback" in message:
        assert "in raises\n" in scorer.log_file.read_text()


def test_weights_that_do_not_fit_are_told_with_the_log(isolated):
    reward = Reward("theirs", isolated("greedy", images=[], prompts=[]))  # called where it should be made
    with pytest.raises(
        InputError,
        match=r"'theirs': its weights do not fit into .*memory.*with more memory.*9 GiB.; see .*theirs.log",
    ) as caught:
        reward.setup("cpu")
    assert not isinstance(caught.value, torch.OutOfMemoryError) and "sampling.batch" not in str(caught.value)


def test_a_score_that_is_not_finite_is_named(isolated):
    reward = Reward("theirs", isolated("spoken", _partial_=True, value=[1.0, float("nan")]))
    with pytest.raises(
        InputError, match=r'image 1 \("b"\): reward \'theirs\' is nan, which cannot be compared'
    ):
        reward.score([RED, DARK], ["a", "b"])


def test_scribbles_on_the_pipe_are_an_error(isolated):
    with pytest.raises(InputError, match=r"sent an invalid message \(expected b'CAPO', got b'Load'\)"):
        isolated("Scribbles")([RED], ["a"])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("Redness", r"TypeError: .*unexpected keyword argument 'facter'"),
        ("Nothing", "AttributeError: module 'their_reward' has no attribute 'Nothing'"),
    ],
)
def test_targets_that_cannot_be_made(target, message, isolated):
    with pytest.raises(InputError, match=message):
        isolated(target, facter=1).to("cpu")


def test_a_function_that_is_not_bound(isolated):
    with pytest.raises(
        InputError,
        match=r"makes .*, which is not callable; for a function of .images, prompts. add `_partial_: true`",
    ):
        isolated("spoken", _args_=[[], []]).to("cpu")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"python": "/nowhere/bin/python"},
            "'theirs': there is no interpreter at python=/nowhere/bin/python; give the path",
        ),
        (
            {"python": "/bin/true"},
            "'theirs': python=/bin/true cannot run a worker .*it must be a Python of version",
        ),
        ({"python": "/usr/bin/yes"}, r"python=/usr/bin/yes cannot run a worker \(it printed more than"),
        (
            {"requires": ["json", "torch"]},
            r"'theirs' needs torch, which (.*) cannot import: \1 -m pip install torch \(or the",
        ),
        ({"scorer": {"_target_": "not_their_reward.Redness"}}, "'theirs' needs not_their_reward, which"),
    ],
)
def test_environments_that_cannot_be_used_are_found_before_any_work(entry, message, isolated, bare):
    config = {"scorer": {"_target_": "their_reward.Redness"}, "python": bare}
    assert load_rewards({"theirs": config})[0].python == bare
    with pytest.raises(InputError, match=message):
        load_rewards({"theirs": config | entry})


def test_a_callable_of_this_process_cannot_be_isolated(bare):
    with pytest.raises(InputError, match="needs a scorer that is named"):
        Reward("theirs", lambda images, prompts: None, python=bare)


def test_a_target_of_this_package_runs_where_the_package_is_not(bare, tmp_path, monkeypatch):
    """Its file is loaded alone, and its own error is what comes back."""
    monkeypatch.delenv("PYTHONPATH", raising=False)  # by which these tests may have found the package
    own = {"_target_": "capo.rewards.vila.VILA", "weights": str(tmp_path)}
    with pytest.raises(InputError, match=r"scorer capo.rewards.vila.VILA in .* failed: ValueError: weights="):
        IsolatedScorer("own", bare, own, 60, tmp_path).to("cpu")


def test_a_worker_outlives_the_thread_that_first_called_it(isolated):
    scorer = isolated("Redness")
    thread = threading.Thread(target=scorer, args=([RED], ["a"]))
    thread.start()
    thread.join()
    pid = scorer._worker.process.pid
    time.sleep(0.2)
    assert not gone(pid, seconds=0.1)
    assert scorer([RED], ["a"]).tolist() == [2]
    assert scorer._worker.process.pid == pid


def test_threads_take_turns(isolated):
    scorer = isolated("Redness")
    with ThreadPoolExecutor(4) as threads:
        scores = list(threads.map(lambda count: scorer([RED] * 2, ["x" * count, ""]).tolist(), range(20)))
    assert scores == [[1 + count, 1] for count in range(20)]


def test_a_worker_ends_with_its_scorer(isolated, targets, pillow_only, tmp_path):
    scorer = IsolatedScorer("theirs", pillow_only, {"_target_": "their_reward.Redness"}, 60, tmp_path / "log")
    scorer.to("cpu")
    pid = scorer._worker.process.pid
    del scorer
    assert gone(pid)


def test_a_worker_is_killed_with_its_parent(isolated):
    """Also in the middle of a score."""
    scorer = isolated("Sleeps")
    reader, writer = os.pipe()
    parent = os.fork()
    if parent == 0:  # a process of its own, which is killed
        try:
            scorer.to("cpu")
            os.write(writer, str(scorer._worker.process.pid).encode())
            scorer([RED], ["hang"])
        finally:
            os._exit(1)
    pid = int(os.read(reader, 20))
    assert not gone(pid, seconds=0.2)
    os.kill(parent, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(parent, 0)[1]) == -signal.SIGKILL
    ended = gone(pid)
    if not ended:
        os.kill(pid, signal.SIGKILL)
    assert ended


def test_the_end_of_stdin_ends_a_worker_at_work(isolated, pillow_only):
    """What holds where the kernel does not end it."""
    process = subprocess.Popen(
        [pillow_only, worker.__file__, "serve", str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        worker.send(process.stdin, {"scorer": {"_target_": "their_reward.Sleeps"}, "device": None})
        assert worker.receive(process.stdout)[0] == {"ready": True, "takes": "rgb"}
        worker.send(process.stdin, {"prompts": ["hang"], "shapes": [[1, 1]]}, [b"rgb"])
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(120) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


class Disturbed(FakeBackbone):
    """Its `decode` first calls `disturb`."""

    disturb = staticmethod(lambda: None)

    def decode(self, latents, batch=8):
        self.disturb()
        return super().decode(latents, batch)


@pytest.mark.parametrize("parallel", ["operations", "batches"])
def test_a_worker_killed_in_the_middle_loses_nothing(
    parallel, isolated, targets, pillow_only, monkeypatch, tmp_path, caplog
):
    monkeypatch.syspath_prepend(targets)
    prompts, pids = (
        [make_prompt(text) for text in ("a red circle", "a blue square", "triangles")],
        tmp_path / "pids",
    )

    def scored(folder, backbone, **isolation):
        settings = SamplerSettings(steps=2, guidance=3.0, batch=3, parallel=parallel)
        plan = PoolSpec(tmp_path / folder, "tiny", "train", 5, prompts, candidates=10, prompts_per_shard=2)
        config = {"scorer": {"_target_": "their_reward.Redness", "pids": pids.name}, **isolation}
        pool = fill_pool(
            plan, ImageGenerator.base(backbone, settings), load_rewards({"theirs": config}), progress=False
        )
        return {
            str(path.relative_to(tmp_path / folder)): path.read_bytes()
            for path in pool.folder.rglob("*")
            if path.is_file()
        }

    def started():
        return [int(pid) for pid in pids.read_text().split()]

    calls = []

    def kill_sometimes():
        calls.append(1)
        if len(calls) in (2, 5):
            os.kill(started()[-1], signal.SIGKILL)

    monkeypatch.chdir(tmp_path)
    undisturbed = scored("here", Disturbed())
    assert started() == [os.getpid()]
    backbone = Disturbed()
    backbone.disturb = kill_sometimes
    with caplog.at_level(logging.WARNING, "capo.rewards.isolated"):
        assert scored("there", backbone, python=pillow_only, timeout=60) == undisturbed
    assert len(started()) == 1 + 3  # one here, and there one and two in its place
    assert [record.message[:31] for record in caplog.records] == ["reward 'theirs': its worker die"] * 2


def test_a_pipe_in_place_of_a_log_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.log")
    told = write_traceback(log_file("pipe", tmp_path), ValueError("x"))
    assert told.startswith(f"the traceback could not be written to {tmp_path / 'pipe.log'} (")

"""The reward interface: a scorer, the facts about it, and the fingerprint under which its scores are stored.

A scorer is a callable `(images, prompts) -> (B,)` on 8-bit RGB PIL images that returns raw scores. A reward's
yaml names it as `scorer: {_target_: ...}`, beside the facts about it. Heavy imports and weights belong in the
scorer's constructor, which runs when the first image is scored.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL.Image import Image
from torch import Tensor

from capo.calibration import LINKS
from capo.errors import InputError
from capo.rewards import worker
from capo.rewards.environments import check_environment
from capo.rewards.isolated import IsolatedScorer
from capo.rewards.sources import check_version, read_from, unpinned_commits
from capo.runtime.batching import FittingBatch, device_memory
from capo.runtime.fingerprints import content_fingerprint, digested
from capo.runtime.names import check_name

Scorer = Callable[[Sequence[Image], Sequence[str]], Tensor]


@dataclass(frozen=True)
class Reward:
    """A scorer and the facts about it. Scores stay raw; `link` and `scale` are used in calibration."""

    graded: ClassVar[bool] = True  # of `capo.data.labels.LabelSource`: its scores are more than ranks,
    stored: ClassVar[bool] = False  # and a scorer computes them

    name: str
    scorer: Mapping[str, Any] | Scorer  # its config, or a ready callable
    link: str = "identity"
    scale: float = 1.0
    range: tuple[float, float] | None = None  # usual lowest and highest score, for reports
    memory: float | None = None  # bytes of its weights in float32, for plans
    weights: str | None = None
    revision: str | None = None
    version: int = 1  # of the scorer's arithmetic: raised with a change that moves scores
    license: str | None = None
    needs_prompt: bool = True  # false where the scorer sees the image only
    tokens: int | None = None  # of a prompt, start and end included, that it reads; None: all
    requires: Sequence[str] = ()  # modules that the scorer imports
    extra: str | None = None  # the pip extra of this package that installs them
    # interpreter of another environment in which the scorer runs; not part of the fingerprint
    python: str | None = None
    # whether the scorer needs a process of its own; with python null, one of this interpreter
    isolated: bool = False
    timeout: float = 300.0  # seconds after which a scorer in another process that does not answer is ended
    logs: Path | None = None  # folder of the log of a scorer in another process; None: a temporary one

    def __post_init__(self) -> None:
        check_name("reward", self.name)
        if self.link not in LINKS:
            raise InputError(
                f"reward '{self.name}': link '{self.link}' is unknown; choose one of {', '.join(LINKS)}"
            )
        if not self.scale > 0:
            raise InputError(
                f"reward '{self.name}': scale {self.scale} must be above 0; for a reward that "
                "is better when lower, negate it in its scorer"
            )
        if self.apart and not isinstance(self.scorer, Mapping):
            place = f"python={self.python}" if self.python else "isolated=true"
            raise InputError(
                f"reward '{self.name}': {place} needs a scorer that is named, "
                "`scorer: {_target_: module.Class}`, not a callable of this process"
            )

    @cached_property
    def fingerprint(self) -> str:
        """Hash of scorer, weights and revision, 64 hex digits; a path counts by the content of its files.

        A version above 1 counts too, and the commits that unpinned hub ids stand for.
        """
        scorer = digested(self.scorer) if isinstance(self.scorer, Mapping) else _qualified_name(self.scorer)
        entries = {"scorer": scorer, "weights": digested(self.weights), "revision": self.revision}
        entries |= {"version": self.version} if self.version != 1 else {}
        entries |= {"commits": self.commits} if self.commits else {}
        return content_fingerprint(entries)

    @cached_property
    def commits(self) -> dict[str, str]:
        """Argument of a revision in the scorer -> the commit that it stands for, where it is none itself."""
        return unpinned_commits(self.scorer)

    @property
    def sources(self) -> dict[str, tuple[str, str | None]]:
        """Configuration key -> (file, folder or hub id; revision) of what a scorer of this package reads.

        Empty for other scorers and for scorers in another process.
        """
        scorer: Any = {} if self.apart else self.scorer
        return {
            f"rewards.{self.name}.{key if key == 'weights' else f'scorer.{key}'}": (source, scorer[revision])
            for key, (source, revision) in (read_from(scorer) if scorer else {}).items()
        }

    @property
    def key(self) -> str:
        """Name under which its scores are stored in a pool: `<name>-<first 8 digits of the fingerprint>`."""
        return f"{self.name}-{self.fingerprint[:8]}"

    @cached_property
    def _callable(self) -> Scorer:
        return _build(self) if isinstance(self.scorer, Mapping) else self.scorer

    @cached_property
    def _batches(self) -> FittingBatch:
        return FittingBatch(f"reward '{self.name}'", self._remedy)

    @property
    def _remedy(self) -> str:
        """Advice for messages about a device that runs out of memory."""
        key = f"rewards.{self.name}.scorer.precision"
        full = isinstance(self.scorer, Mapping) and self.scorer.get("precision") == "float32"
        half = (
            f"set {key}=bfloat16, and evaluation.{key} if it is used in evaluation too (half the memory, "
            "other scores), "
            if full
            else ""
        )
        return (
            f"{half}score apart from sampling (generate.py stage=score) or on a device with more memory, "
            "or choose smaller weights"
        )

    def setup(self, device: str | torch.device) -> None:
        """Build the scorer, and move it to `device` if it has a `to`.

        Raises InputError if the scorer cannot be built, or if its weights do not fit into the device's
        memory, which is then freed.
        """
        if not hasattr(self._callable, "to"):
            return
        try:
            self._callable.to(device)
            return
        except torch.OutOfMemoryError as error:
            reason = str(error)
        # Outside the handler: its traceback keeps alive the tensors that were being moved.
        self.offload()
        torch.cuda.empty_cache()  # so that the message reports free memory correctly
        size = f" ({self.held / 1e9:.1f} GB)" if self.held else ""
        raise InputError(
            f"reward '{self.name}': its weights{size} do not fit into {device_memory()}: {self._remedy} "
            f"({reason})"
        )

    def offload(self) -> None:
        """Move the scorer to the CPU until the next `setup`, to free the device's memory for training.

        A scorer in another process on a GPU is ended instead.
        """
        if isinstance(self._callable, IsolatedScorer):
            self._callable.leave()
        elif hasattr(self._callable, "to"):
            self._callable.to("cpu")

    @property
    def apart(self) -> bool:
        """Whether its scorer runs in another process."""
        return bool(self.python or self.isolated)

    def give_up(self) -> None:
        """End a scorer in another process at once, from any thread; a request under way then fails."""
        if isinstance(self._callable, IsolatedScorer):
            self._callable.give_up()

    @property
    def held(self) -> float | None:
        """Bytes of its weights in its scorer's precision; None if `memory` is not declared."""
        half = isinstance(self.scorer, Mapping) and self.scorer.get("precision") in ("bfloat16", "float16")
        return self.memory and self.memory / (2 if half else 1)

    @property
    def side(self) -> int | None:
        """Side in pixels of the square images that the scorer's `side` requires; None: any size."""
        return getattr(self._callable, "side", None)

    def score(
        self, images: Sequence[Image], prompts: Sequence[str], where: Callable[[int], str] | None = None
    ) -> Tensor:
        """Return raw scores (B,), float32 on the CPU; batches are halved if the device runs out of memory.

        `where` maps index i of the batch to its name in messages. Raises InputError for a score that is not
        finite or, with link log, not a probability; for a scorer that does not return (B,); and if a single
        image does not fit into the device's memory.
        """
        scores = torch.cat(self._batches(lambda part: self._raw(images[part], prompts[part]), len(images)))
        if (bad := self._unusable(scores)).any():
            first = int(bad.nonzero()[0])
            place = where(first) if where else f'image {first} ("{prompts[first]}")'
            fault = "is not a probability" if self.link == "log" else "cannot be compared"
            raise InputError(
                f"{place}: reward '{self.name}' is {scores[first].item()}, which {fault}; check "
                "its weights and precision, then run generate.py again (existing scores are kept)"
            )
        return scores

    @torch.no_grad()
    def _raw(self, images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        raw = self._callable(list(images), list(prompts))
        scores = torch.as_tensor(raw).detach().to("cpu", torch.float32)
        if scores.shape != (len(images),):
            raise InputError(
                f"reward '{self.name}': its scorer returned shape {tuple(scores.shape)} for "
                f"{len(images)} images; it must return one number per image, shape (B,)"
            )
        return scores

    def _unusable(self, scores: Tensor) -> Tensor:
        bad = ~scores.isfinite()
        return bad | (scores < 0) | (scores > 1 + 1e-6) if self.link == "log" else bad


def load_rewards(
    config: Mapping[str, Mapping[str, Any]], place: str = "rewards", logs: Path | None = None
) -> list[Reward]:
    """Create rewards, in order, from `{name: {scorer: {_target_: ...}, link: ..., ...}}`; build no scorer.

    Args:
        config: the rewards.
        place: their key in the configuration, for messages.
        logs: folder of the logs of scorers in other processes; None: a temporary one.

    Raises:
        InputError: there is no reward; a reward has an unknown key or no scorer; a required module is not
            installed (in its environment, for a reward with `python`); `python` is not an interpreter; or
            weights given as an absolute path do not exist.
    """
    if not config:
        raise InputError(f"{place}: no reward is configured; name at least one, as in rewards=shapes")
    if not isinstance(config, Mapping) or not all(isinstance(entry, Mapping) for entry in config.values()):
        raise InputError(f"{place}={config}: must be rewards by name, {{NAME: {{scorer: {{...}}}}}}")
    if without := [name for name, entry in config.items() if "scorer" in entry and not entry["scorer"]]:
        raise InputError(_no_scorer(without, place))
    return [_load(name, entry, place, logs) for name, entry in config.items()]


def _no_scorer(names: Sequence[str], place: str) -> str:
    first = names[0]
    group = "rewards" if place == "rewards" else f"rewards@{place}"
    return (
        f"{place}: {', '.join(names)} {'has' if len(names) == 1 else 'have'} no scorer. Bring your own, a "
        f"callable (images, prompts) -> (B,): `scorer: {{_target_: module.Class}}` in "
        f"conf/rewards/{first}.yaml, or +{place}.{first}.scorer._target_=module.Class on the command line; "
        f"or choose other rewards ({group}=shapes)"
    )


def _load(name: str, entry: Mapping[str, Any], place: str, logs: Path | None) -> Reward:
    known = [field.name for field in fields(Reward) if field.name not in ("name", "logs")]
    if unknown := sorted(set(entry) - set(known)):
        raise InputError(f"{place}.{name}: unknown key {', '.join(unknown)}; known are {', '.join(known)}")
    if "scorer" not in entry:
        raise InputError(f"{place}.{name}: it has no scorer; add `scorer: {{_target_: module.Class, ...}}`")
    _check_scorer(entry["scorer"], f"{place}.{name}.scorer")
    _check_requires(entry.get("requires", ()), f"{place}.{name}.requires")
    reward = Reward(name, **entry, logs=logs)
    if reward.python:
        root = str(entry["scorer"].get("_target_")).split(".")[0]  # capo itself need not be installed there
        check_environment(name, reward.python, [*reward.requires, *([] if root == "capo" else [root])])
    elif missing := [module for module in reward.requires if find_spec(module) is None]:
        raise InputError(_not_installed(reward, ", ".join(missing)))
    if reward.weights and Path(reward.weights).is_absolute() and not Path(reward.weights).exists():
        raise InputError(
            f"reward '{name}': no weights at {reward.weights}; set {place}.{name}.weights to their location"
        )
    return reward


def _check_scorer(scorer: object, key: str) -> None:
    named = isinstance(scorer, Mapping) and isinstance(scorer.get("_target_"), str)
    if not named and (isinstance(scorer, Mapping) or not callable(scorer)):
        raise InputError(f"{key}={scorer}: must name what is called, {{_target_: module.Class, ...}}")


def _check_requires(modules: object, key: str) -> None:
    """InputError unless it is a list of names; looking for one of another form may import its package."""
    if isinstance(modules, str):
        raise InputError(f"{key}={modules}: must be a list, requires: [{modules}]")
    if not isinstance(modules, (list, tuple)) or not all(name and isinstance(name, str) for name in modules):
        raise InputError(f"{key}={modules}: must be a list of names of modules")


def _not_installed(reward: Reward, modules: str) -> str:
    remedy = f"pip install 'capo[{reward.extra}]'" if reward.extra else f"pip install {modules}"
    if reward.isolated:
        remedy += (
            ", or give the interpreter of an environment that has it: "
            f"++rewards.{reward.name}.python=/path/to/env/bin/python"
        )
    return f"reward '{reward.name}' needs {modules}, which is not installed: {remedy}"


def _build(reward: Reward) -> Scorer:
    assert isinstance(reward.scorer, Mapping)  # a callable is used as it is
    scorer = {**reward.scorer, **reward.commits}  # what the fingerprint names, whatever the hub has by now
    try:
        check_version(reward.name, reward.scorer, reward.version)
        if reward.apart:
            python = reward.python or sys.executable
            return IsolatedScorer(reward.name, python, scorer, reward.timeout, reward.logs)
        return worker.build(scorer)
    except InputError:
        raise
    except Exception as error:  # a user's own class can raise anything
        if isinstance(error, ModuleNotFoundError) and error.name:
            raise InputError(_not_installed(reward, error.name)) from error
        raise InputError(
            f"reward '{reward.name}': its scorer {scorer.get('_target_')} cannot be built "
            f"({error}); compare its arguments with the class"
        ) from error


def _qualified_name(scorer: Scorer) -> str:
    return f"{scorer.__module__}.{getattr(scorer, '__qualname__', type(scorer).__qualname__)}"

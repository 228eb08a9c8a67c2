"""Rewards: one interface over scorers, what is known about each, and the fingerprint its scores lie under.

A scorer is a callable `(images, prompts) -> (B,)` on 8-bit RGB PIL images that returns raw scores. It stands
in a reward's yaml as `scorer: {_target_: ...}`, beside what is known about it; heavy imports and weights
belong in its constructor, which runs when the first image is scored.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from capo.calibration import LINKS
from capo.errors import InputError
from capo.rewards import worker
from capo.rewards.isolated import IsolatedScorer, check_environment
from capo.runtime.batching import FittingBatch, device_memory
from capo.runtime.fingerprints import content_fingerprint, file_digest

Scorer = Callable[[Sequence[Image], Sequence[str]], Tensor]


@dataclass(frozen=True)
class Reward:
    """A scorer and what is known about it; its scores stay raw, `link` and `scale` are for calibration."""

    name: str
    scorer: Mapping[str, Any] | Scorer  # its config, or a ready callable
    link: str = "identity"
    scale: float = 1.0
    range: tuple[float, float] | None = None  # usual lowest and highest score, for reports
    memory: float | None = None  # bytes of its weights in float32, for plans
    weights: str | None = None
    revision: str | None = None
    license: str | None = None
    needs_prompt: bool = True  # false where the scorer sees the image only
    requires: Sequence[str] = ()  # modules that the scorer imports
    extra: str | None = None  # the pip extra of this package that brings them
    python: str | None = (
        None  # another environment's interpreter, which the scorer runs under; moves no score
    )
    isolated: bool = False  # its modules are not for this process: where python is null it runs in another one of this interpreter
    timeout: float = 300.0  # seconds after which a scorer there that has not answered is ended
    logs: Path | None = None  # folder of the log of a scorer in another process; None: a temporary one

    def __post_init__(self) -> None:
        if self.link not in LINKS:
            raise InputError(
                f"reward '{self.name}': link '{self.link}' is unknown; choose one of {', '.join(LINKS)}"
            )
        if not self.scale > 0:
            raise InputError(
                f"reward '{self.name}': scale {self.scale} must be above 0; for a reward that "
                "is better when lower, negate it in its scorer"
            )
        if (self.python or self.isolated) and not isinstance(self.scorer, Mapping):
            place = f"python={self.python}" if self.python else "isolated=true"
            raise InputError(
                f"reward '{self.name}': {place} needs a scorer that is named, "
                "`scorer: {_target_: module.Class}`, not a callable of this process"
            )

    @cached_property
    def fingerprint(self) -> str:
        """64 hex digits over scorer, weights and revision; a path counts as the content that lies there."""
        scorer = _content(self.scorer) if isinstance(self.scorer, Mapping) else _qualified_name(self.scorer)
        weights = _content(self.weights)
        return content_fingerprint({"scorer": scorer, "weights": weights, "revision": self.revision})

    @property
    def sources(self) -> dict[str, tuple[str, str | None]]:
        """Setting -> (file, folder or hub id; revision) of all that a scorer of this package reads in this process."""
        if (
            self.python
            or self.isolated
            or not isinstance(self.scorer, Mapping)
            or not str(self.scorer["_target_"]).startswith("capo.rewards.")
        ):
            return {}
        paired = {key: "revision" if key == "weights" else f"{key}_revision" for key in self.scorer}
        return {
            f"rewards.{self.name}.{key if key == 'weights' else f'scorer.{key}'}": (
                str(self.scorer[key]),
                self.scorer[revision],
            )
            for key, revision in paired.items()
            if revision in self.scorer and self.scorer[key]
        }

    @property
    def key(self) -> str:
        """`<name>-<fp8>`: under this its scores lie in a pool."""
        return f"{self.name}-{self.fingerprint[:8]}"

    @cached_property
    def _callable(self) -> Scorer:
        return _build(self) if isinstance(self.scorer, Mapping) else self.scorer

    @cached_property
    def _batches(self) -> FittingBatch:
        return FittingBatch(f"reward '{self.name}'", self._remedy)

    @property
    def _remedy(self) -> str:
        """What helps where the device's memory runs out."""
        key = f"rewards.{self.name}.scorer.precision"
        full = isinstance(self.scorer, Mapping) and self.scorer.get("precision") == "float32"
        half = (
            f"set {key}=bfloat16, and evaluation.{key} where it evaluates too (half the memory, other scores), "
            if full
            else ""
        )
        return f"{half}score apart from sampling (generate.py stage=score) or on a device with more memory, or choose smaller weights"

    def setup(self, device: str | torch.device) -> None:
        """Builds the scorer, moves it to `device` if it has a `to`.

        Raises InputError where it cannot be built, and where its weights do not fit into the device's memory, which it has left again.
        """
        if not hasattr(self._callable, "to"):
            return
        try:
            self._callable.to(device)
            return
        except torch.OutOfMemoryError as error:
            reason = str(error)
        # outside of the handler, whose traceback holds what was being moved
        self.offload()
        torch.cuda.empty_cache()  # what the message calls free is free
        size = f" ({self.held / 1e9:.1f} GB)" if self.held else ""
        raise InputError(
            f"reward '{self.name}': its weights{size} do not fit into {device_memory()}: {self._remedy} ({reason})"
        )

    def offload(self) -> None:
        """Off the device until the next `setup`: during training steps its memory is the policy's."""
        if isinstance(self._callable, IsolatedScorer):
            self._callable.leave()
        elif hasattr(self._callable, "to"):
            self._callable.to("cpu")

    @property
    def held(self) -> float | None:
        """Bytes of its weights in the precision of its scorer; None where nobody has said."""
        half = isinstance(self.scorer, Mapping) and self.scorer.get("precision") in ("bfloat16", "float16")
        return self.memory and self.memory / (2 if half else 1)

    @property
    def side(self) -> int | None:
        """Pixels of the square images that it judges, where its scorer's `side` says that it takes no others."""
        return getattr(self._callable, "side", None)

    def score(
        self, images: Sequence[Image], prompts: Sequence[str], where: Callable[[int], str] | None = None
    ) -> Tensor:
        """Raw scores (B,) float32 on the CPU, one an image; in smaller batches where the device's memory runs out.

        `where` names image i of the batch in messages. Raises InputError for a score that is not finite, or
        no probability where the link is log, for a scorer that does not return (B,), and where one image
        alone is too large for the device.
        """
        scores = torch.cat(self._batches(lambda part: self._raw(images[part], prompts[part]), len(images)))
        if (bad := self._unusable(scores)).any():
            first = int(bad.nonzero()[0])
            place = where(first) if where else f'image {first} ("{prompts[first]}")'
            fault = "is no probability" if self.link == "log" else "cannot be compared"
            raise InputError(
                f"{place}: reward '{self.name}' is {scores[first].item()}, which {fault}; check "
                "its weights and precision, then run generate.py again (what is scored stays)"
            )
        return scores

    @torch.no_grad()
    def _raw(self, images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        raw = self._callable(list(images), list(prompts))
        scores = torch.as_tensor(raw).detach().to("cpu", torch.float32)
        if scores.shape != (len(images),):
            raise InputError(
                f"reward '{self.name}': its scorer returned shape {tuple(scores.shape)} for "
                f"{len(images)} images; it must return one number an image, shape (B,)"
            )
        return scores

    def _unusable(self, scores: Tensor) -> Tensor:
        bad = ~scores.isfinite()
        return bad | (scores < 0) | (scores > 1 + 1e-6) if self.link == "log" else bad


def load_rewards(
    config: Mapping[str, Mapping[str, Any]], place: str = "rewards", logs: Path | None = None
) -> list[Reward]:
    """Rewards from `{name: {scorer: {_target_: ...}, link: ..., ...}}`, in that order; builds no scorer.

    `place` is their key in the configuration, for messages; `logs` as `Reward.logs`. Raises InputError for no reward at all, a key that is
    none of Reward's, a reward without a scorer, a module that is not installed (there, for a reward with `python`), a
    `python` that is no interpreter, and weights that are given as an absolute path and are not there.
    """
    if not config:
        raise InputError(f"{place}: none is configured; name at least one, as in rewards=shapes")
    if without := [name for name, entry in config.items() if "scorer" in entry and not entry["scorer"]]:
        raise InputError(_no_scorer(without, place))
    return [_load(name, {"logs": logs, **entry}, place) for name, entry in config.items()]


def _no_scorer(names: Sequence[str], place: str) -> str:
    first = names[0]
    group = "rewards" if place == "rewards" else f"rewards@{place}"
    return (
        f"{place}: {', '.join(names)} {'has' if len(names) == 1 else 'have'} no scorer. Bring your own, a "
        f"callable (images, prompts) -> (B,): `scorer: {{_target_: module.Class}}` in conf/rewards/{first}.yaml, or "
        f"+{place}.{first}.scorer._target_=module.Class on the command line; or choose other rewards ({group}=shapes)"
    )


def _load(name: str, entry: dict[str, Any], place: str) -> Reward:
    known = [field.name for field in fields(Reward) if field.name != "name"]
    if unknown := sorted(set(entry) - set(known)):
        raise InputError(f"{place}.{name}: unknown key {', '.join(unknown)}; known are {', '.join(known)}")
    if "scorer" not in entry:
        raise InputError(f"{place}.{name}: it has no scorer; add `scorer: {{_target_: module.Class, ...}}`")
    reward = Reward(name, **entry)
    if reward.python:
        root = str(reward.scorer.get("_target_")).split(".")[0]  # capo itself need not be installed there
        check_environment(name, reward.python, [*reward.requires, *([] if root == "capo" else [root])])
    elif missing := [module for module in reward.requires if find_spec(module) is None]:
        raise InputError(_not_installed(reward, ", ".join(missing)))
    if reward.weights and Path(reward.weights).is_absolute() and not Path(reward.weights).exists():
        raise InputError(
            f"reward '{name}': no weights at {reward.weights}; set {place}.{name}.weights to where they lie"
        )
    return reward


def _not_installed(reward: Reward, modules: str) -> str:
    remedy = f"pip install 'capo[{reward.extra}]'" if reward.extra else f"pip install {modules}"
    if reward.isolated:
        remedy += f", or give the interpreter of an environment that has it: ++rewards.{reward.name}.python=/path/to/env/bin/python"
    return f"reward '{reward.name}' needs {modules}, which is not installed: {remedy}"


def _build(reward: Reward) -> Scorer:
    if reward.python or reward.isolated:
        return IsolatedScorer(
            reward.name, reward.python or sys.executable, reward.scorer, reward.timeout, reward.logs
        )
    try:
        return worker.build(dict(reward.scorer))
    except InputError:
        raise
    except Exception as error:  # a user's own class can raise anything
        if isinstance(error, ModuleNotFoundError) and error.name:
            raise InputError(_not_installed(reward, error.name)) from error
        raise InputError(
            f"reward '{reward.name}': its scorer {reward.scorer.get('_target_')} cannot be made "
            f"({error}); compare its arguments with the class"
        ) from error


def _qualified_name(scorer: Scorer) -> str:
    return f"{scorer.__module__}.{getattr(scorer, '__qualname__', type(scorer).__qualname__)}"


def _content(value: Any) -> Any:
    """`value` with every path in it replaced by digests of what lies there: no machine's paths count."""
    if isinstance(value, Mapping):
        return {str(key): _content(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_content(inner) for inner in value]
    # without a slash it is a word: a folder that happens to be called like an option must change nothing
    if isinstance(value, Path) or (isinstance(value, str) and "/" in value):
        path = Path(value).expanduser()
        if _lies_there(path) and path.is_file():
            return file_digest(path)
        if _lies_there(path) and path.is_dir():
            return {
                str(file.relative_to(path)): file_digest(file)
                for file in sorted(path.rglob("*"))
                if file.is_file() and not file.name.startswith(".")
            }
    return value


def _lies_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # too long for a name: a sentence with a slash in it
        return False

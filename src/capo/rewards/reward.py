"""The reward interface: a scorer, the facts about it, and the fingerprint under which its scores are stored.

A scorer is a callable `(images, prompts) -> (B,)` on 8-bit RGB PIL images that returns raw scores. A reward's
yaml names it as `scorer: {_target_: ...}`, beside the facts about it. Heavy imports and weights belong in the
scorer's constructor, which runs when the first image is scored.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL.Image import Image
from torch import Tensor

from capo.calibration import LINKS
from capo.errors import InputError
from capo.rewards import guard, lookup
from capo.rewards.environments import not_installed
from capo.rewards.isolated import IsolatedScorer
from capo.rewards.logs import log_file, write_traceback
from capo.rewards.sources import check_version, read_from, unpinned_commits
from capo.runtime.batching import FittingBatch
from capo.runtime.fingerprints import content_fingerprint, digested
from capo.runtime.memory import memory_of, ran_out
from capo.runtime.names import check_name
from capo.runtime.own_code import called_by, name_of

LARGEST = 1e18  # of a score: in float32 the squares of larger ones, of which reports take means, are infinite
Scorer = Callable[[Sequence[Image], Sequence[str]], Iterable[Any]]  # one number per image


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
    logs: Path | None = None  # folder of its scorer's log; None: a temporary one

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
        scorer = digested(self.scorer) if isinstance(self.scorer, Mapping) else name_of(self.scorer)
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
        )
        apart = "score apart from sampling (generate.py stage=score) or on a device with more memory"
        return f"{half if full else ''}{apart}, or choose smaller weights"

    def setup(self, device: str | torch.device) -> None:
        """Build the scorer, and move it to `device` if it has a `to`.

        Raises InputError if the scorer cannot be built or moved, or if its weights do not fit into memory,
        which is then freed.
        """
        try:
            if hasattr(self._callable, "to"):
                with self._named(f"cannot be moved to {device} ({{}})"), guard.undisturbed():
                    self._callable.to(device)
            return
        except (RuntimeError, MemoryError, OSError) as error:
            if not ran_out(error):
                raise
            reason, memory = str(error), memory_of(error)
        # Outside the handler: its traceback keeps alive the tensors that were being moved.
        self.offload()
        torch.cuda.empty_cache()  # so that free memory is what other work finds
        size = f" ({self.held / 1e9:.1f} GB)" if self.held else ""
        raise InputError(
            f"reward '{self.name}': its weights{size} do not fit into {memory}: {self._remedy} ({reason})"
        )

    def offload(self) -> None:
        """Move the scorer to the CPU until the next `setup`, to free the device's memory for training.

        A scorer in another process on a GPU is ended instead; one that was not built stays so.
        """
        if isinstance(scorer := self._built, IsolatedScorer):
            scorer.leave()
        elif hasattr(scorer, "to"):
            with self._named("cannot be moved to cpu ({})"), guard.undisturbed():
                scorer.to("cpu")

    @property
    def _built(self) -> Any:
        """The scorer if it has been built, else None."""
        return self.__dict__.get("_callable")

    @property
    def apart(self) -> bool:
        """Whether its scorer runs in another process."""
        return bool(self.python or self.isolated)

    def give_up(self) -> None:
        """End a scorer in another process at once, from any thread; a request under way then fails."""
        if isinstance(scorer := self._built, IsolatedScorer):
            scorer.give_up()

    @property
    def held(self) -> float | None:
        """Bytes of its weights in its scorer's precision; None if `memory` is not declared."""
        half = isinstance(self.scorer, Mapping) and self.scorer.get("precision") in ("bfloat16", "float16")
        return self.memory and self.memory / (2 if half else 1)

    @property
    def side(self) -> int | None:
        """Side in pixels of the square images that the scorer's `side` requires; None: any size."""
        with self._named("failed in its attribute `side`: {}"):
            return getattr(self._callable, "side", None)

    def score(
        self, images: Sequence[Image], prompts: Sequence[str], where: Callable[[int], str] | None = None
    ) -> Tensor:
        """Return raw scores (B,), float32 on the CPU; batches are halved if the device runs out of memory.

        `where` maps index i of the batch to its name in messages. Raises InputError for a score that is not
        finite, above LARGEST or, with link log, not a probability; for a scorer that raises or does not
        return one number per image; and if a single image does not fit into memory. Whatever the scorer
        changes in this process is put back (`capo.rewards.guard.undisturbed`), and it gets image copies.
        """

        def place(index: int) -> str:
            return where(index) if where else f'image {index} ("{prompts[index]}")'

        scorer = self._callable

        def scored(part: slice) -> Tensor:
            try:
                with self._named("failed: {}"):
                    found = guard.scores(scorer, images[part], prompts[part])
            except InputError as error:
                if ran_out(error) or not images[part]:
                    raise
                last = f" to {place(part.stop - 1)}" if part.stop > part.start + 1 else ""
                raise InputError(f"{place(part.start)}{last}: {error}") from error
            return torch.tensor(found, dtype=torch.float64).to(torch.float32)

        scores = torch.cat(self._batches(scored, len(images)))
        bad = ~(scores.abs() <= LARGEST)  # NaN too
        bad |= (self.link == "log") & ((scores < 0) | (scores > 1 + 1e-6))
        if bad.any():
            first = int(bad.nonzero()[0])
            fault = "is not a probability" if self.link == "log" else "cannot be compared"
            raise InputError(
                f"{place(first)}: reward '{self.name}' is {scores[first].item()}, which {fault}; check "
                "its weights and precision, then run generate.py again (existing scores are kept)"
            )
        return scores

    @contextmanager
    def _named(self, fault: str) -> Iterator[None]:
        """InputError with the reward, and the log that has the traceback, for what a scorer raises.

        `fault` says what went wrong, with {} for the exception; an InputError says so itself.
        """
        target = self.scorer.get("_target_") if isinstance(self.scorer, Mapping) else name_of(self.scorer)
        what = f"reward '{self.name}': its scorer {target}"
        try:
            yield
        except guard.NoScores as error:
            raise InputError(f"{what} {error}") from error
        except (Exception, SystemExit) as error:
            ends = isinstance(error, SystemExit) and type(error) is not SystemExit  # Lightning's, on SIGTERM
            ours = self._built is None or isinstance(self._built, IsolatedScorer)  # they name the reward
            if isinstance(error, InputError) and not ours and not ran_out(error):
                raise InputError(f"reward '{self.name}': {error}") from error
            if isinstance(error, InputError) or ran_out(error) or ends:
                raise
            trace = write_traceback(log_file(self.name, self.logs), error)
            raise InputError(f"{what} {fault.format(guard.told(error))}; {trace}") from error

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Let a scorer that has been built in this process look at all prompts, before images are drawn.

        Its method `check_prompts`, where it has one, raises InputError for a prompt that it cannot read.
        """
        scorer = None if self.apart else self._built
        check = getattr(called_by(scorer), "check_prompts", None)
        if check is not None:
            with self._named("failed in its method `check_prompts`: {}"):
                check(prompts)

    @property
    def has_features(self) -> bool:
        """Whether its scorer, in this process, turns images into vectors by a method `features`."""
        return not self.apart and hasattr(self._callable, "features")

    def features(self, images: Sequence[Image]) -> Tensor:
        """Return the scorer's vectors (B, D) of images, float32; copies, batches, errors as for `score`."""

        def encoded(part: slice) -> Tensor:
            with self._named("failed in its method `features`: {}"):
                return guard.vectors(self._callable, images[part])

        return torch.cat(self._batches(encoded, len(images)))


def _build(reward: Reward) -> Scorer:
    assert isinstance(reward.scorer, Mapping)  # a callable is used as it is
    scorer = {**reward.scorer, **reward.commits}  # what the fingerprint names, whatever the hub has by now
    with reward._named("cannot be built ({}); correct it, or its arguments"):
        check_version(reward.name, reward.scorer, reward.version)
        if reward.apart:
            python = reward.python or sys.executable
            return IsolatedScorer(reward.name, python, scorer, reward.timeout, reward.logs)
        try:
            with guard.undisturbed():
                return lookup.made(scorer)
        except ModuleNotFoundError as lost:
            if not lost.name:
                raise
            raise InputError(not_installed(reward.name, [lost.name], reward.extra, reward.isolated)) from lost

"""Errors caused by a value that the user gave, not by a fault of this package; parts of their messages."""

import difflib
import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path

LONGEST = 200  # letters of a key that is compared with the known ones


class InputError(ValueError):
    """A value that the user gave cannot be used; the message names the value, the place and the remedy."""


class ParameterError(InputError):
    """An argument of a pure function that cannot be used; `capo.cli` adds the key that set it.

    Attributes:
        parameter: name of the parameter.
        value: the value that was given.
        must: requirement on the value, such as "must be a positive number".
    """

    def __init__(self, parameter: str, value: object, must: str):
        super().__init__(f"{parameter} {must}, got {value!r}")
        self.parameter, self.value, self.must = parameter, value, must

    def __reduce__(self):
        return type(self), (self.parameter, self.value, self.must)


class DamagedFile(InputError):
    """A file that cannot be read as what it should be: it was damaged, edited, or something else is there.

    Attributes:
        path: the file.
        reason: what is wrong with it, with the field.
        remedy: what to do.
    """

    form = "{path} cannot be read ({reason}); {remedy}"

    def __init__(self, path: Path, reason: str, remedy: str):
        super().__init__(self.form.format(path=path, reason=reason, remedy=remedy))
        self.path, self.reason, self.remedy = path, reason, remedy

    def __reduce__(self):
        return type(self), (self.path, self.reason, self.remedy)  # exceptions travel between processes


# names of keys in other programs that train diffusion models
ELSEWHERE = {
    "learning_rate": "lr",
    "batch_size": "batch",
    "train_batch_size": "batch",
    "max_train_steps": "max_steps",
    "lr_warmup_steps": "warm_up",
    "warmup_steps": "warm_up",
    "max_grad_norm": "gradient_clip",
    "mixed_precision": "precision",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "beta_dpo": "beta",
}


def closest(word: str, words: Sequence[str], count: int = 1) -> list[str]:
    """Up to `count` of `words` that are most similar to `word`, ignoring case; an empty list if none is."""
    by_lower = {name.lower(): name for name in words}
    return [by_lower[name] for name in difflib.get_close_matches(word.lower(), list(by_lower), count, 0.6)]


def alike(key: str, known: Iterable[str], count: int = 2) -> list[str]:
    """Known keys that were probably meant by `key`: those with the same last part, then a similar spelling.

    None for a key that is far longer than any: comparing it would take minutes.
    """
    if len(key) > LONGEST:
        return []
    last = key.rpartition(".")[2]
    last = ELSEWHERE.get(last, last)
    likeness = {name: difflib.SequenceMatcher(a=key, b=name).ratio() for name in known}
    chosen = [name for name, ratio in likeness.items() if ratio > 0.75 or name.rpartition(".")[2] == last]
    chosen.sort(key=lambda name: (name == last, name.endswith(f".{last}"), likeness[name]), reverse=True)
    return [
        name
        for place, name in enumerate(chosen)
        if not any(better.startswith(f"{name}.") for better in chosen[:place])
    ][:count]


def first_line(error: BaseException) -> str:
    """First line of an error's message, or the name of its class if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def load_reason(error: BaseException) -> str:
    """What was wrong with a file of torch.save: the first line of the error, but never torch's advice.

    Of a pickle that `weights_only` refuses, torch advises to load it without that guard.
    """
    if isinstance(error, pickle.UnpicklingError):
        return "its pickle is damaged, or holds more than tensors and plain values, which could run code"
    return first_line(error)


class Unfinished(RuntimeError):
    """Work of which a part failed while the rest was done; the message names what failed, and why."""

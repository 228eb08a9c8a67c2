"""UTF-8 text: the lines of a file, and prompt sets of one's own, one prompt a line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from capo.data.prompts.identity import Prompt, check_splits, make_prompt
from capo.errors import InputError


@contextmanager
def readable(place: str) -> Iterator[None]:
    """A file that the system does not hand out becomes an InputError; `place` is key and value, `prompts.train=FILE`."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{place}: cannot be read ({error.strerror or error}); give the path of a file that is there"
        ) from error


def decoded_lines(file: Path, place: str) -> Iterator[str]:
    """The lines of a UTF-8 file with their ends, without a byte order mark. Raises InputError where they are no such text."""
    start = 0
    with readable(place), file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{place}: not UTF-8 text (byte {start + error.start}) in line {number}; save it as UTF-8"
                ) from error
            start += len(line)
            yield text.removeprefix("\ufeff") if number == 1 else text


def text_files(train: str | Path, validation: str | Path, test: str | Path) -> dict[str, list[Prompt]]:
    """Prompt sets from UTF-8 text files, one prompt a line, in the files' order; lines without text are passed over.

    These sets are one's own choice, so nothing is filtered, and a prompt that stands twice is an error: `split_sets` drops and
    counts. Raises InputError for a file that cannot be read, is not UTF-8 text or holds no prompt, and for whatever
    `check_splits` refuses.
    """
    files = {"train": train, "validation": validation, "test": test}
    splits = {
        split: _prompts(f"prompts.{split}={file}", Path(file).expanduser()) for split, file in files.items()
    }
    check_splits(splits)
    return splits


def _prompts(place: str, file: Path) -> list[Prompt]:
    prompts = [prompt for line in decoded_lines(file, place) if (prompt := make_prompt(line)).text]
    if not prompts:
        raise InputError(f"{place}: no prompt in it; write one prompt a line")
    return prompts

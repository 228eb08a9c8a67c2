"""UTF-8 text files: reading their lines, and prompt sets with one prompt per line."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from capo.data.prompts.identity import Prompt, check_splits, make_prompt
from capo.errors import InputError
from capo.runtime.reading import open_ordinary, parse_json


@contextmanager
def readable(place: str) -> Iterator[None]:
    """Context manager that turns an OSError into an InputError.

    `place` names the file in the message, as key and value: `prompts.train=FILE`.
    """
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{place}: cannot be read ({error.strerror or error}); give the path of a file that exists"
        ) from error


def unreadable(place: str) -> Callable[[Path, str], InputError]:
    """Fault of `open_ordinary` for the file that `place` names."""
    return lambda path, reason: InputError(
        f"{place}: cannot be read ({reason}); give the path of a file that exists"
    )


def decoded_lines(file: Path, place: str) -> Iterator[str]:
    """Lines of a UTF-8 file with their line ends, without a byte order mark.

    Raises InputError if the file cannot be read, is not UTF-8, or is no ordinary file: a pipe would be waited
    for, and a device may have no end.
    """
    start = 0
    with readable(place), open_ordinary(file, unreadable(place)) as lines:
        for number, line in enumerate(lines, start=1):
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{place}: not UTF-8 text (byte {start + error.start}) in line {number}; save it as UTF-8"
                ) from error
            if "\0" in text:  # the letters of UTF-16 without its mark are UTF-8 with null bytes between
                raise InputError(
                    f"{place}: a null byte in line {number}, which no text has; save it as UTF-8"
                )
            start += len(line)
            yield text.removeprefix("\ufeff") if number == 1 else text


TEXTS = {"prompt", "caption"}  # columns of a table that hold its prompts


def prompt_lines(file: Path, place: str) -> Iterator[str]:
    """Prompts of a file with one per line, whose ends may be LF, CRLF or CR.

    Raises InputError, as `decoded_lines` does, and for a file that begins as a table does.
    """
    for number, line in enumerate(decoded_lines(file, place)):
        prompts = line.rstrip("\r\n").split("\r")
        if number == 0 and (form := _table_form(prompts[0])):
            split = ".".join(re.findall(r"\w+", place)[:2])  # prompts.train
            raise InputError(
                f"{place}: its first line is that of a table ({prompts[0][:80]}), and here every line is a "
                f"prompt; to read the table, give prompts=files and {split}.format={form}"
            )
        yield from prompts


def _table_form(first: str) -> str | None:
    """Format of the table whose first line this is: keys or columns, of which one is the prompt, or None."""
    if first.lstrip().startswith("{"):
        try:
            found = parse_json(first)
        except ValueError:
            return None
        return "jsonl" if isinstance(found, dict) and TEXTS & {name.lower() for name in found} else None
    for form, delimiter in (("csv", ","), ("tsv", "\t")):
        names = [name.strip().strip('"').lower() for name in first.split(delimiter)]
        if TEXTS & set(names) and all(re.fullmatch(r"\w+", name) for name in names):
            return form
    return None


def text_files(train: str | Path, validation: str | Path, test: str | Path) -> dict[str, list[Prompt]]:
    """Prompt sets from UTF-8 text files with one prompt per line, in the order of the lines.

    Blank lines are skipped. The sets are taken to be hand-made: nothing is filtered, and a duplicate prompt
    is an error (`split_sets` drops duplicates and counts them). Raises InputError for a file that cannot be
    read, is not UTF-8 or has no prompt, and for everything that `check_splits` rejects.
    """
    files = {"train": train, "validation": validation, "test": test}
    splits = {
        split: _prompts(f"prompts.{split}={file}", Path(file).expanduser()) for split, file in files.items()
    }
    check_splits(splits)
    return splits


def _prompts(place: str, file: Path) -> list[Prompt]:
    prompts = [prompt for line in prompt_lines(file, place) if (prompt := make_prompt(line)).text]
    if not prompts:
        raise InputError(f"{place}: the file has no prompt; write one prompt per line")
    return prompts

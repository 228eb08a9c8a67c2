"""End an entry script with one message for a user error, and with one line for Ctrl-C."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from hydra._internal import utils as hydra_internals
from hydra.core.hydra_config import HydraConfig
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.types import RunMode
from omegaconf.errors import InterpolationResolutionError
from safetensors import SafetensorError
from tqdm import tqdm
from yaml import YAMLError

from capo.cli.choice_faults import local_of, no_names, repeated, twice_chosen, unknown_choice
from capo.cli.hydra_record import restore
from capo.cli.key_faults import key_fault, unreadable
from capo.cli.place_faults import disk_fault, written_fault
from capo.cli.sweep_faults import number_fault, sweep_fault
from capo.cli.values import unresolved
from capo.errors import InputError, Unfinished, first_line
from capo.runtime.memory import memory_of, ran_out
from capo.runtime.terminal import printable, typed

FAILED, REFUSED, INTERRUPTED, ENDED = 1, 2, 130, 143  # exit codes
GROUP_CHOICE = re.compile(r"\+?[\w/]+(@[\w.]+)?=[A-Za-z_\[]")
# null, a mapping and a reference are values; anything else names files of conf/rewards
NAMED_REWARDS = re.compile(r"(validation\.held_out|evaluation\.rewards)=(?!null$|[{$])")
SEARCHED = re.compile(r"provider=main, path=file://(\S+)")
LONG_NUMBER = re.compile(r"\d{1000}")
LISTED = re.compile(r"Error merging override (.+)")
LISTED_IN = re.compile(r"In '([^']+)': ")
CONF = Path(__file__).parents[3] / "conf"  # beside src/; not there in an installed package


def was_interrupted(error: BaseException) -> bool:
    """Whether Ctrl-C caused `error`; Lightning turns a KeyboardInterrupt into an exit with code 1."""
    return isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt)


@contextmanager
def plain_errors(go_on: str | None = None) -> Iterator[None]:
    """End the process with one message instead of a traceback.

    An InputError, a disk that cannot be written and memory that runs out give exit code 2, work of which a
    part failed 1, Ctrl-C 130, and SIGTERM in training 143.
    `go_on` names the command that resumes interrupted work; by default the same command in the same
    directory. HYDRA_FULL_ERROR=1 shows tracebacks.
    """
    try:
        yield
    except Unfinished as error:
        if _wants_trace():
            raise
        _end(f"error: {error}", FAILED)
    except (InputError, OSError, SafetensorError, RuntimeError, MemoryError) as error:
        message = told_fault(error)
        if message is None or _wants_trace():
            raise
        _end(f"error: {message}", REFUSED)
    except (KeyboardInterrupt, SystemExit) as error:
        ended = type(error).__name__ == "SIGTERMException"  # Lightning's, which is not imported here
        if type(error) is SystemExit and not error.code:
            told = "code that this command called ended it by sys.exit(); HYDRA_FULL_ERROR=1 shows where"
            if _wants_trace():
                raise RuntimeError(told) from error
            _end(f"error: {told}", FAILED)
        if not (ended or was_interrupted(error)) or _wants_trace():
            raise
        if ended:
            _end(f"ended by SIGTERM; {go_on or _same_command()} resumes it", ENDED)
        _end(f"interrupted; finished work is kept, and {go_on or _same_command()} resumes it", INTERRUPTED)


def grouped(arguments: Sequence[str]) -> list[str]:
    """Rewrite `validation.held_out=[a,b]` as Hydra's `rewards@validation.held_out=[a,b]`, and its like."""
    return [f"rewards@{argument}" if NAMED_REWARDS.match(argument) else argument for argument in arguments]


def start(main: Callable[[], object]) -> None:
    """Call a script's Hydra `main`; end with one message for an error in the command line.

    Hydra's own message for an unknown key suggests adding the key, which would then be silently ignored.
    """
    report = hydra_internals.run_and_report
    for stream in (sys.stdout, sys.stderr):  # what a terminal cannot show must not end a run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.argv[1:] = grouped(sys.argv[1:])
    os.environ["MPLBACKEND"] = "agg"  # pictures go to files; the user's may need a window, or be unknown
    try:
        os.getcwd()
    except OSError as error:
        _end(
            f"error: the working directory cannot be used ({error.strerror}): change to another one", REFUSED
        )

    _check_options(sys.argv[1:])

    def explained(call: Callable[[], object]) -> object:
        try:
            return call()
        except Exception as error:
            message = command_fault(error) or disk_fault(error) or disk_fault(error.__cause__)
            if message is None or _wants_trace():
                raise
            _end(f"error: {message}", REFUSED)

    hydra_internals.run_and_report = lambda call: report(lambda: explained(call))
    try:
        main()
    except (ValueError, HydraException) as error:  # Hydra's own, of its options, which it reports as it is
        if _wants_trace():
            raise
        options = f"{str(error).removesuffix('!')}; `--hydra-help` lists the options"
        _end(f"error: {command_fault(error) or options}", REFUSED)
    except KeyboardInterrupt:  # before the stage has begun, or between the jobs of a sweep
        _end("interrupted; finished work is kept", INTERRUPTED)
    except SystemExit as error:
        if error.code == REFUSED:
            restore()
        raise
    finally:
        hydra_internals.run_and_report = report


def _check_options(arguments: Sequence[str]) -> None:
    """End with one line for options that Hydra's parser would refuse with all of its usage."""

    def refuse(message: str) -> NoReturn:
        _end(f"error: {message}; `--hydra-help` lists the options", REFUSED)

    parser = hydra_internals.get_args_parser()
    parser.error = refuse
    options, left = parser.parse_known_args(arguments)
    many = options.multirun or "hydra.mode=MULTIRUN" in options.overrides
    written = (f"{text}: {told}" for text in options.overrides if (told := written_fault(text, many)))
    numbered = number_fault(options.overrides) if many else None
    if fault := next(written, None) or repeated(options.overrides) or numbered:
        _end(f"error: {fault}", REFUSED)
    asked = {text.partition("=")[0] for text in options.overrides}
    if options.shell_completion and not asked & {"install", "uninstall", "query"}:
        refuse("--shell-completion: what it is to do is missing; add install=SHELL or uninstall=SHELL")
    if unknown := [text for text in left if text.startswith("-")]:
        key, equal, value = unknown[0].lstrip("-").partition("=")
        given = typed(key, value) if equal else f"{key}=VALUE"
        refuse(f"{unknown[0]}: there is no such option; a value is given without dashes, {given}")
    if left:
        _end(
            f"error: {left[0]}: an option stands between it and the other key=value; give all of these in "
            "one place, before or after the options",
            REFUSED,
        )


def refused(error: Exception, code: int = REFUSED) -> int:
    """Print the message of an error that a user can cause, and return the exit code; raise any other."""
    if isinstance(error, BrokenPipeError):  # whoever read the output has stopped; nor may the end flush it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return code
    message = told_fault(error)
    if message is None or _wants_trace():
        raise error
    print(printable(f"error: {message}"), file=sys.stderr)
    return code


def told_fault(error: BaseException) -> str | None:
    """Message for an error that a user can cause; None for any other error."""
    return str(error) if isinstance(error, InputError) else disk_fault(error) or memory_fault(error)


def memory_fault(error: BaseException) -> str | None:
    """Message for an error that means that memory ran out; None for any other error."""
    if not ran_out(error):
        return None
    return (
        f"{memory_of(error)} has run out ({first_line(error)}): end what else is in it, lower sampling.batch "
        "and trainer.micro_batch, or use a machine with more; plan=true tells what a run takes"
    )


def command_fault(error: BaseException, arguments: Sequence[str] | None = None) -> str | None:
    """Message for an error in the command line, with what was probably meant; None for any other error.

    `arguments` are those of the command line, by default this process's.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if isinstance(error, OverrideParseException):
        if any(
            "\ud800" <= letter <= "\udfff" for letter in error.override
        ):  # bytes that Python left as they are
            return (
                f"'{error.override}' is no text in the encoding of this system "
                f"({sys.getfilesystemencoding()}); set PYTHONUTF8=1, or a locale with UTF-8"
            )
        return unreadable(error.override, str(error))
    if isinstance(error, MissingConfigException):
        group, _, choice = (error.missing_cfg_file or "").rpartition("/")
        if options := error.options or _choices(str(error), group):
            return unknown_choice(group, choice, options, arguments)
    if (fault := value_fault(error, arguments)) is not None:
        return fault
    if not isinstance(error, ConfigCompositionException):
        if not isinstance(error, HydraException):
            return None
        folder = "; --config-dir takes a folder with groups, such as rewards/ and experiment/"
        return " ".join(f"{error} {error.__cause__ or ''}".split()) + folder * ("directory" in str(error))
    own = key_fault(error, arguments, CONF) or twice_chosen(str(error), arguments)
    return own or " ".join(f"{error} {error.__cause__ or ''}".split())


def value_fault(error: BaseException, arguments: Sequence[str]) -> str | None:
    """Message for a value of the command line that Hydra cannot read at all; None for any other error."""
    text = str(error)
    if isinstance(error, InterpolationResolutionError):
        return unresolved(error)
    if isinstance(error, YAMLError):  # it names file and line
        return f"a file of the configuration is not YAML: {' '.join(text.split())}; correct it"
    if isinstance(error, UnicodeDecodeError):
        return f"{_file_read(error)} is no UTF-8 text from byte {error.start} on; save it as UTF-8"
    if isinstance(error, RecursionError):
        chosen = [argument for argument in arguments if GROUP_CHOICE.match(argument)]
        return (
            "the files of the configuration are nested too deeply: a defaults list names its own file, two "
            "files name each other, or hundreds of sections stand in each other; look at what the command "
            f"chooses ({' '.join(chosen) or 'the main file'})"
        )
    if "for integer string conversion" in text:  # Python's limit
        long = next((argument for argument in arguments if LONG_NUMBER.search(argument)), None)
        place = f"{long.partition('=')[0]}={long.partition('=')[2][:20]}..." if long else "a file of conf/"
        return f"{place}: a number has too many digits to be read; give a smaller one"
    if (fault := no_names(error) or sweep_fault(text, arguments)) is not None:
        return fault
    if "Cannot merge DictConfig with ListConfig" in f"{text}{error.__cause__}":
        if listed := LISTED.match(text):
            key = listed[1].partition("=")[0].lstrip("+")
            return f"{listed[1]}: {key} is a section of keys, not a list; give {key}.KEY=VALUE"
        if listed := LISTED_IN.match(text):
            return (
                f"{listed[1]}.yaml, which the command line chooses, holds a list where keys with values must "
                "stand, in a section or as a whole; correct it"
            )
    return None


def _file_read(error: BaseException) -> str:
    """Name the file that Hydra was reading when this was raised."""
    return str(local_of(error, "full_path") or "a file of the configuration")


def _choices(message: str, group: str) -> list[str]:
    """Choices of a group, read from the folder that Hydra searched.

    Hydra does not list them itself if one name of a list is unknown.
    """
    searched = SEARCHED.search(message)
    return sorted(path.stem for path in Path(searched[1], group).glob("*.yaml")) if searched and group else []


def _same_command() -> str:
    if not HydraConfig.initialized():
        return "the same command"
    own = HydraConfig.get()
    if own.mode is RunMode.MULTIRUN:
        return f"the same command with {typed('hydra.sweep.dir', own.sweep.dir)}"
    return f"the same command with {typed('hydra.run.dir', own.runtime.output_dir)}"


def _wants_trace() -> bool:
    return os.environ.get("HYDRA_FULL_ERROR", "0") == "1"


def _end(message: str, code: int) -> NoReturn:
    for bar in list(getattr(tqdm, "_instances", ())):  # Lightning leaves its own open
        bar.close()
    print(printable(message), file=sys.stderr)
    raise SystemExit(code) from None

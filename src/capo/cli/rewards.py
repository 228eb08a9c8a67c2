"""Check a reward on this machine, with its real weights (docs/rewards.md).

    python -m capo.rewards check pickscore
    python -m capo.rewards check mps mps.weights=FILE --record
    python -m capo.rewards check hpsv2 --published FOLDER

The exit code is 0 if everything passed, 1 if a check failed or nothing could be checked.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from capo.cli.compose import REPOSITORY, composed
from capo.cli.messages import refused
from capo.cli.named_rewards import rewards_of
from capo.cli.schema import check_values
from capo.cli.schema.rewards import Reward as Entry
from capo.cli.schema.rewards import RewardsAlone
from capo.errors import InputError, closest
from capo.rewards import Reward
from capo.rewards.published import check_known, compared, pictures
from capo.rewards.selfcheck import (
    FAILED,
    PASSED,
    PROMPTS,
    TOLERANCE,
    WARNING,
    Finding,
    Measured,
    device_name,
    findings,
    golden_places,
    measure,
    read_golden,
    write_golden,
)
from capo.runtime.options import number
from capo.runtime.terminal import Terminal

# overrides may be written `NAME.weights=...` or `rewards.NAME.weights=...`
OVERRIDE = re.compile(r"^([+~]*)(?:rewards\.)?")
DEVICE = re.compile(r"cpu|cuda(:\d{1,3})?", re.ASCII)
COLORS = {PASSED: "green", WARNING: "yellow", FAILED: "red"}


def arguments(command: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        "python -m capo.rewards", description="Check a reward on this machine, with its real weights."
    )
    parser.add_argument("command", choices=["check"])
    parser.add_argument(
        "name", help="NAME of conf/rewards/NAME.yaml; the rewards of a set are checked one after the other"
    )
    parser.add_argument(
        "overrides", nargs="*", help="values of its yaml to override, as in NAME.weights=FOLDER"
    )
    parser.add_argument(
        "--record", action="store_true", help="record the scores, with which later checks compare theirs"
    )
    parser.add_argument(
        "--golden",
        type=Path,
        help="file of recorded scores; by default ./golden/NAME.json, then the package's own",
    )
    parser.add_argument(
        "--published",
        type=Path,
        help="folder of 1.webp to 4.webp from zai-org/ImageReward, whose published scores are compared",
    )
    parser.add_argument("--device", help="cuda, cuda:1 or cpu; by default the GPU if there is one")
    parser.add_argument(
        "--tolerance",
        type=number(),
        default=TOLERANCE,
        help=f"tolerance within which scores count as equal; default {TOLERANCE}",
    )
    parser.add_argument(
        "--conf",
        type=Path,
        help="folder that holds rewards/NAME.yaml; by default the repository's conf/, else ./conf",
    )
    return parser.parse_intermixed_args(command)


def configured(name: str, overrides: Sequence[str], conf: Path | None) -> list[Reward]:
    """Rewards of conf/rewards/NAME.yaml with `overrides`; builds no scorer.

    Raises InputError for a name or value that cannot be used.
    """
    folder = _conf(conf)
    known = sorted(path.stem for path in (folder / "rewards").glob("*.yaml"))
    if name not in known:
        near = closest(name, known)
        raise InputError(
            f"{name}: no such reward; {folder / 'rewards'} has {', '.join(known)}"
            + (f"; did you mean {near[0]}?" if near else "")
        )
    for override in overrides:
        if re.split(r"[.=]", OVERRIDE.sub("", override))[0] in Entry.model_fields:
            raise InputError(f"{override}: say of which reward, as in {name}.{OVERRIDE.sub('', override)}")
    cfg = composed(
        None, [f"+rewards={name}", *(OVERRIDE.sub(r"\1rewards.", override) for override in overrides)], folder
    )
    check_values(cfg, RewardsAlone)
    return rewards_of(cfg, "rewards")


def _conf(given: Path | None) -> Path:
    places = [given] if given else [REPOSITORY / "conf", Path("conf")]
    for place in places:
        if (place / "rewards").is_dir():
            return place.absolute()
    raise InputError(
        f"no rewards/ in {' or '.join(map(str, places))}; name the folder that holds it: --conf FOLDER"
    )


def chosen_device(given: str | None) -> torch.device:
    """Return `given`, else the GPU if there is one; make a GPU the current device, so its memory is read.

    Raises InputError for a device that torch does not find, and for one of another kind.
    """
    name = given or ("cuda" if torch.cuda.is_available() else "cpu")
    if not DEVICE.fullmatch(name):
        raise InputError(f"--device {name}: must be cuda, cuda:NUMBER or cpu")
    device = torch.device(name)
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            raise InputError(
                f"--device {device}: torch finds {torch.cuda.device_count()} GPUs here; choose another one, "
                "or cpu"
            )
        torch.cuda.set_device(device.index or 0)
    return device


def recorded(reward: Reward, options: argparse.Namespace) -> dict | None:
    """Recorded scores to compare with; None if there are none, or if they are to be recorded now.

    Raises InputError for a file without valid records, which is not written over either, and for a file named
    by the user that lacks scores of this fingerprint.
    """
    golden = read_golden(golden_places(reward.name, options.golden), reward)
    if options.record:
        return None
    if options.golden and golden is None:
        fault = "it has no scores" if options.golden.is_file() else "there is no such file, so no scores"
        raise InputError(
            f"--golden {options.golden}: {fault} of fingerprint {reward.fingerprint[:8]}; --record writes "
            "them there"
        )
    return golden


def examined(reward: Reward, options: argparse.Namespace) -> tuple[Measured | None, list[Finding]]:
    """Measure a reward: its scores, speed and memory (None if it gave no scores), and the findings."""
    try:
        golden = recorded(reward, options)
    except InputError as error:  # before weights are loaded
        return None, [Finding("recorded scores", FAILED, str(error), "as it says")]
    try:
        measured = measure(reward, options.device)
        beside = [compared(reward, options.pictures, options.device)] if options.pictures else []
    except InputError as error:
        return None, [Finding("weights and scores", FAILED, str(error), "as it says")]
    made = f"fingerprint {reward.fingerprint[:8]}, finite, on {device_name(options.device)}"
    return measured, [
        Finding("weights and scores", PASSED, made),
        *findings(reward, measured, golden, options.tolerance),
        *beside,
    ]


def check(reward: Reward, options: argparse.Namespace, console: Console) -> bool:
    """Check one reward and print the findings; return whether no check failed."""
    measured, found = examined(reward, options)
    if measured:
        console.print(score_table(reward, measured))
    console.print(finding_table(reward, found))
    passed = all(finding.outcome != FAILED for finding in found)
    if options.record and measured and passed:
        path = options.golden or golden_places(reward.name, None)[0]
        write_golden(path, reward, measured.scores, options.device)
        console.print(f"recorded: {path}", soft_wrap=True)
    elif options.record:
        console.print("nothing was recorded, since a check failed")
    return passed


def score_table(reward: Reward, measured: Measured) -> Table:
    """Table of a reward's scores, with its speed and memory in the caption."""
    caption = f"{measured.speed:.1f} images/s; peak memory {measured.memory}"
    table = Table(
        "picture",
        "with its own prompt",
        "with the next one's",
        title=reward.name,
        caption=caption,
        title_justify="left",
    )
    for name, (own, other) in zip(PROMPTS, measured.scores.tolist(), strict=True):
        table.add_row(f"{name}: {PROMPTS[name]}", f"{own:.4f}", f"{other:.4f}")
    return table


def finding_table(reward: Reward, found: Sequence[Finding]) -> Table:
    """Table of the findings: what passed or failed, and what to do."""
    table = Table(
        "check",
        "",
        "found",
        "what to do",
        title=f"check of {reward.name}",
        title_justify="left",
        show_lines=True,
    )
    for finding in found:
        table.add_row(
            finding.name, Text(finding.outcome, COLORS[finding.outcome]), finding.found, finding.remedy
        )
    return table


def main(command: Sequence[str] | None = None) -> int:
    """Check the named rewards and print the findings; return the exit code."""
    options, console = arguments(command), Terminal()
    try:
        options.device = chosen_device(options.device)
        rewards = configured(options.name, options.overrides, options.conf)
        if options.golden and len(rewards) > 1:
            raise InputError(
                f"--golden {options.golden}: {options.name} is a set of {len(rewards)} rewards; check them "
                "one by one to name a file"
            )
        if options.published:
            check_known(rewards)
        options.pictures = pictures(options.published) if options.published else None
        passed = [check(reward, options, console) for reward in rewards]
    except Exception as error:  # of check, too: the file of recorded scores cannot be written
        return refused(error, 1)
    return int(not all(passed))


if __name__ == "__main__":
    sys.exit(main())

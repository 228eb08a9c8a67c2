"""Check a reward on this machine, with its real weights (docs/rewards.md).

    python -m capo.rewards check pickscore
    python -m capo.rewards check mps mps.weights=FILE --record

Exit code 0 where everything passed, 1 where a check failed or nothing could be checked.
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

from capo.cli.build import rewards_of
from capo.cli.compose import REPOSITORY, composed
from capo.errors import InputError, closest
from capo.rewards import Reward
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

OVERRIDE = re.compile(
    r"^([+~]*)(?:rewards\.)?"
)  # `NAME.weights=...` and `rewards.NAME.weights=...` are the same here
COLORS = {PASSED: "green", WARNING: "yellow", FAILED: "red"}


def arguments(command: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m capo.rewards", description="Check a reward on this machine, with its real weights."
    )
    parser.add_argument("command", choices=["check"])
    parser.add_argument(
        "name", help="of conf/rewards/NAME.yaml; a set's rewards are checked one after the other"
    )
    parser.add_argument("overrides", nargs="*", help="values of its yaml, as in NAME.weights=FOLDER")
    parser.add_argument(
        "--record", action="store_true", help="keep the scores, for later checks to compare with"
    )
    parser.add_argument(
        "--golden",
        type=Path,
        help="file of recorded scores; by default golden/NAME.json here, then the package's own",
    )
    parser.add_argument(
        "--device", type=torch.device, help="cuda, cuda:1, cpu; by default the GPU where there is one"
    )
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE, help=f"of equal scores, {TOLERANCE} by default"
    )
    parser.add_argument(
        "--conf",
        type=Path,
        help="folder that holds rewards/NAME.yaml; by default the repository's conf/, or the one here",
    )
    return parser.parse_intermixed_args(command)


def configured(name: str, overrides: Sequence[str], conf: Path | None) -> list[Reward]:
    """The rewards of conf/rewards/NAME.yaml, no scorer built. Raises InputError for a name or value that cannot be used."""
    folder = _conf(conf)
    known = sorted(path.stem for path in (folder / "rewards").glob("*.yaml"))
    if name not in known:
        near = closest(name, known)
        raise InputError(
            f"{name}: no such reward; {folder / 'rewards'} has {', '.join(known)}"
            + (f"; did you mean {near[0]}?" if near else "")
        )
    cfg = composed(
        None, [f"+rewards={name}", *(OVERRIDE.sub(r"\1rewards.", override) for override in overrides)], folder
    )
    return rewards_of(cfg, "rewards")


def _conf(given: Path | None) -> Path:
    places = [given] if given else [REPOSITORY / "conf", Path("conf")]
    for place in places:
        if (place / "rewards").is_dir():
            return place.absolute()
    raise InputError(
        f"no rewards/ in {' and '.join(map(str, places))}; give the folder that has it: --conf FOLDER"
    )


def chosen_device(given: torch.device | None) -> torch.device:
    """`given`, else the GPU where there is one; a GPU becomes the current one, of whose memory messages tell.

    Raises InputError for one that torch does not see.
    """
    device = given or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            raise InputError(
                f"--device {device}: torch sees {torch.cuda.device_count()} GPUs here; choose another one, or cpu"
            )
        torch.cuda.set_device(device.index or 0)
    return device


def recorded(reward: Reward, options: argparse.Namespace) -> dict | None:
    """The scores to compare with; None where there are none, or they are to be recorded now.

    Raises InputError for a file that is no record, and for one that the user has named and that lacks this fingerprint.
    """
    if options.record:
        return None
    golden = read_golden(golden_places(reward.name, options.golden), reward.fingerprint)
    if options.golden and golden is None:
        fault = "it has no scores" if options.golden.is_file() else "there is no such file, so no scores"
        raise InputError(
            f"--golden {options.golden}: {fault} of fingerprint {reward.fingerprint[:8]}; --record writes them there"
        )
    return golden


def examined(reward: Reward, options: argparse.Namespace) -> tuple[Measured | None, list[Finding]]:
    """What the reward gave, None where it gave nothing, and what was found."""
    try:
        golden = recorded(reward, options)
    except InputError as error:  # before weights are loaded
        return None, [Finding("recorded scores", FAILED, str(error), "as it says")]
    try:
        measured = measure(reward, options.device)
    except InputError as error:
        return None, [Finding("weights and scores", FAILED, str(error), "as it says")]
    made = f"fingerprint {reward.fingerprint[:8]}, finite, on {device_name(options.device)}"
    return measured, [
        Finding("weights and scores", PASSED, made),
        *findings(reward, measured, golden, options.tolerance),
    ]


def check(reward: Reward, options: argparse.Namespace, console: Console) -> bool:
    """Print what was found of one reward; whether nothing failed."""
    measured, found = examined(reward, options)
    if measured:
        console.print(score_table(reward, measured))
    console.print(finding_table(reward, found))
    passed = all(finding.outcome != FAILED for finding in found)
    if options.record and passed:
        path = options.golden or golden_places(reward.name, None)[0]
        write_golden(path, reward, measured.scores, options.device)
        console.print(f"recorded: {path}", markup=False, soft_wrap=True)
    elif options.record:
        console.print("nothing is recorded, since a check failed")
    return passed


def score_table(reward: Reward, measured: Measured) -> Table:
    """Scores, speed and memory."""
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
    """What passed and failed, and what to do."""
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
            finding.name, f"[{COLORS[finding.outcome]}]{finding.outcome}", finding.found, finding.remedy
        )
    return table


def main(command: Sequence[str] | None = None) -> int:
    """Check and say so; the exit code."""
    options, console = arguments(command), Console()
    try:
        options.device = chosen_device(options.device)
        rewards = configured(options.name, options.overrides, options.conf)
        if options.golden and len(rewards) > 1:
            raise InputError(
                f"--golden {options.golden}: {options.name} is a set of {len(rewards)} rewards; check them one by one to name a file"
            )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    passed = [check(reward, options, console) for reward in rewards]
    return int(not all(passed))


if __name__ == "__main__":
    sys.exit(main())

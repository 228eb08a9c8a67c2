"""A run of Weights & Biases, with what lets it be found, and resumed, beside it."""

from __future__ import annotations

import inspect
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from lightning.pytorch.loggers import WandbLogger

from capo.data.watching import SECONDS
from capo.errors import InputError, closest
from capo.runtime.files import write_json
from capo.runtime.reading import read_json
from capo.runtime.schema import fault

# arguments of wandb.init that follow from the run directory, and from WANDB_MODE
GIVEN = ("project", "dir", "mode", "resume", "reinit")

# types that options are checked for; wandb itself names no option where one does not fit
CHECKED = {str | None: str | None, Sequence[str] | None: list[str] | None}

Mode = Literal["online", "offline", "disabled", "shared"]  # of wandb.init; disabled: it keeps nothing
ONLINE: Mode = "online"
OFFLINE: Mode = "offline"
ALIASES = {"dryrun": OFFLINE, "run": ONLINE}  # of WANDB_MODE


@dataclass(frozen=True)
class RunIdentity:
    """Facts by which experiment trackers find and group a run.

    Attributes:
        axes: settings that are often swept, as a flat mapping of objective, beta, bias, pairs, rewards,
            model, lr, seed.
        config: the whole configuration, as in `config.yaml`.
        group: name of the sweep that the run is a job of, or None.
        tags: names of the objective, pairs strategy, model and rewards.
        job_type: W&B's job type.
    """

    axes: Mapping[str, Any]
    config: Mapping[str, Any]
    group: str | None = None
    tags: Sequence[str] = ()
    job_type: str = "train"


class WandbRun(WandbLogger):
    """W&B logger with one W&B run per run directory: a resumed run keeps its id, and `close` ends it.

    `folder/wandb.json` repeats id, group, job_type, tags, config and summary, so that they can be read
    without the W&B server.
    """

    def __init__(self, folder: str | Path, project: str, **options: Any):
        super().__init__(project=project, save_dir=str(folder))
        self.record_path, self._options = Path(folder) / "wandb.json", options
        self._record: dict[str, Any] = {}
        self._pool_figures: set[str] = set()  # whose axis W&B knows

    def begin(self, identity: RunIdentity) -> None:
        """Start a W&B run, or resume the one whose id `wandb.json` holds."""
        import wandb

        check_options(self._options)
        mode = wandb_mode()
        if mode == OFFLINE:
            print(
                "W&B: offline (no API key found, or set by WANDB_MODE); "
                f"`wandb sync {self.save_dir}/wandb/offline-*` uploads the run"
            )
        there, remedy = self.record_path.is_file(), "remove it for a W&B run of its own"
        before = read_json(self.record_path, remedy) if there else {}
        self._record = {
            "id": before.get("id") or secrets.token_hex(4),
            "group": identity.group,
            "job_type": identity.job_type,
            "tags": list(identity.tags),
            "config": {**identity.axes, "run": identity.config},
            "summary": before.get("summary", {}),
        }
        # before the server is contacted: if this process ends early, the next one resumes under the same id
        self._write()
        given = {key: self._record[key] for key in ("id", "group", "job_type", "tags", "config")}
        if mode == OFFLINE:
            given["settings"] = wandb.Settings(silent=True)  # the line printed above says it
        self._experiment = wandb.init(
            project=self.name,
            dir=self.save_dir,
            mode=mode,
            resume="allow",
            reinit="create_new",
            **(given | self._options),
        )
        self._experiment.define_metric("trainer/global_step")
        self._experiment.define_metric("*", step_metric="trainer/global_step")

    def log_pools(self, figures: Mapping[str, float]) -> None:
        """Log a row of figures of pools, drawn over seconds: they are from before the first step."""
        for name in figures.keys() - self._pool_figures:
            self._pool_figures.add(name)
            self.experiment.define_metric(name, step_metric=None if name == SECONDS else SECONDS)
        self.experiment.log(dict(figures))

    def summarize(self, figures: Mapping[str, float]) -> None:
        """Record the final figures: as W&B summary values, as a table `outcome`, and in `wandb.json`."""
        self._record["summary"] = dict(figures)
        self.log_table(
            "outcome",
            columns=["figure", "value"],
            data=[[name, float(value)] for name, value in figures.items()],
        )
        self.experiment.summary.update(dict(figures))
        self._write()

    def close(self) -> None:
        """Finish the W&B run, so that this process can start another one."""
        if self._experiment is not None:
            self._experiment.finish()

    def _write(self) -> None:
        write_json(self.record_path, self._record)


def check_options(options: Mapping[str, Any]) -> None:
    """Raise InputError for an option that `wandb.init` does not take, or that this package gives it."""
    import wandb

    kinds = get_type_hints(wandb.init)
    known = [name for name in inspect.signature(wandb.init).parameters if name not in GIVEN]
    for name, value in options.items():
        if name not in known:
            near = closest(name, known)
            what = "this package gives it to wandb.init itself"
            raise InputError(
                f"logger.wandb.{name}={value}: "
                + (what if name in GIVEN else "wandb.init takes no such option")
                + (f"; did you mean +logger.wandb.{near[0]}?" if near else "; leave it out")
            )
        kind = CHECKED.get(kinds[name])
        if kind is not None and (told := fault(kind, f"logger.wandb.{name}", value)):
            raise InputError(told)


def wandb_mode() -> Mode:
    """Return WANDB_MODE if it is set, else online if there is an API key. InputError for any other."""
    mode: Any = os.environ.get("WANDB_MODE", "").strip().lower()
    mode = ALIASES.get(mode, mode)
    modes = get_args(Mode)
    if mode in modes:
        return mode
    if mode:
        raise InputError(
            f"the environment variable WANDB_MODE={mode}: must be one of {', '.join(modes)}; set one, or "
            "unset it"
        )
    os.environ.pop("WANDB_MODE", None)  # wandb would refuse the empty string as an unknown mode
    import wandb

    return ONLINE if os.environ.get("WANDB_API_KEY") or wandb.api.api_key else OFFLINE

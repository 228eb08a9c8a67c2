"""The whole configuration of each entry script."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from capo.cli.schema.engines import Engine
from capo.cli.schema.evaluating import Benchmark, Study
from capo.cli.schema.groups import Import, Loggers, Objective, Pairs, Prompts
from capo.cli.schema.kinds import DType, Files, Folder, Folders, Names, Run, Seed, Text
from capo.cli.schema.pools import Evaluation, PairExport, Planning, Pool, Sampling, Validation
from capo.cli.schema.rewards import Rewards
from capo.cli.schema.trainer import Anchor, Data, Model, Noise, Online, Reference, Selection, Trainer
from capo.runtime import limits
from capo.runtime.schema import Said, Section, key


class Training(Section):
    """Configuration of train.py; the other scripts have all of its keys."""

    seed: Seed = key("seed of training only: order of the prompts, pairs, times and noise")
    threads: Annotated[int, Field(ge=1, le=limits.CORES)] | None = key(
        "threads of this process; null: the cores, divided by the number of processes on this machine"
    )
    run_dir: Text = key("run directory; hydra.run.dir sets it")
    calibration: Literal["win_rate", "raw", "zscore"] = key(
        "how raw scores become rewards; raw and zscore are controls"
    )
    objective: Objective = key("the loss", group="objective")
    reference: Reference = key("what the policy is compared with", group="reference")
    pairs: Pairs = key("which candidates may win and which may lose", group="pairs")
    pool: Pool = key("images of the base, shared by all runs")
    online: Online = key("candidates that the policy draws anew while it is trained")
    engine: Engine = key("which processes fill the pools", group="engine")
    selection: Selection = key("how many candidates of a prompt a batch holds")
    sampling: Sampling = key("how images are drawn")
    data: Data = key("how batches are loaded")
    noise: Noise = key("times and noise at which the errors are computed")
    anchor: Anchor = key("penalty on the winner's error above the reference's")
    validation: Validation = key("images in training, by which the checkpoint is chosen")
    evaluation: Evaluation = key("test images of policy and base")
    trainer: Trainer = key("optimizer, devices, precision and memory", group="trainer")
    model: Model = key("the base, and what belongs to it", group="model")
    prompts: Prompts = key("prompts by split", group="prompts")
    rewards: Rewards = key("the rewards that are trained on", group="rewards")
    logger: Loggers = key("where curves are written", group="logger")
    plan: bool = key("true: report what a run takes and what this machine lacks, loading nothing")
    planning: Planning = key("what plan=true assumes")
    check: bool = key("true: load the model and measure its real weights, in a few minutes")
    evaluate: bool = key("evaluate the policy at the end, as `evaluate.py run=DIR` does")
    export: Literal["adapter", "full", "single_file"] = key(
        "of a LoRA policy: an adapter; full: merged into a whole pipeline; single_file (UNets, any policy): "
        "also one checkpoint file"
    )
    export_dtype: DType = key("of a whole pipeline's weights; float16 and bfloat16 take half the space")
    push_to_hub: Text | None = key("owner/name: upload the policy at the end; a new repository is private")


class Evaluating(Training):
    """Configuration of evaluate.py."""

    run: Run | None = key("directory of a finished run")
    runs: Folders | None = key("several run directories, or a multirun directory, to compare in one table")
    policy: Folder | None = key("folder of an exported policy, in place of a run")
    base: Folder | None = key("folder of the base's weights; null: the model's own")
    benchmark: Benchmark | None = key("a benchmark to draw and score", None, group="benchmark")
    results: Files | None = key("results that the benchmark's official scorer wrote, to read back")
    trust: Names = key("exact names of other code that a run's config may call")


class Studying(Training):
    """Configuration of `python -m capo.cli.study`."""

    run: Folder | None = key("directory of a finished run, whose policy is compared with its base")
    policy: Folder | None = key("folder of an exported policy, in place of a run")
    base: Folder | None = key("folder of the base's weights; null: the model's own")
    trust: Names = key("exact names of other code that a run's config may call")
    study: Study = key("how people are asked")


class Generating(Training):
    """Configuration of generate.py."""

    import_: Import | None = Field(
        None, alias="import", description="source of stage=import", json_schema_extra={"group": "import"}
    )
    stage: Literal["all", "text", "latents", "score", "import", "export", "report", "status", "verify"] = key(
        "all: text, latents and score, one after the other; text, latents, score: one of them alone; "
        "import: make a pool of existing images; export: write pairs for other trainers; report: describe "
        "the candidates' scores; status: what is done of the pools; verify: read every file of them"
    )
    repair: bool = key("with stage=verify: make the files that cannot be used again")
    pair_export: PairExport = key("what stage=export writes")


class Merging(Training):
    """Configuration of merge.py."""

    policies: Folders = key(
        "folders of exported policies of the model, in the order in which they are merged", later=True
    )
    method: Literal["slerp", "linear"] = key(
        "slerp: along the arc between task vectors, tensor by tensor; linear: base + their weighted sum"
    )
    weights: (
        Annotated[
            list[Annotated[float, Field(ge=-limits.SHARES, le=limits.SHARES)]],
            Said(f"a list of numbers from {-limits.SHARES} to {limits.SHARES}, one for each policy"),
        ]
        | None
    ) = key("one for each policy; null: equal ones, which sum to 1")


SCRIPTS = {
    "train": Training,
    "evaluate": Evaluating,
    "generate": Generating,
    "merge": Merging,
    "study": Studying,
}

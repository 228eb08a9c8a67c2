"""What `online.every` and `reference.interval` go with, and what rounds make of a run."""

from __future__ import annotations

from omegaconf import DictConfig

from capo.cli.build import is_negative, moving_reference
from capo.cli.schema.calls import under
from capo.data.rounds import refreshes
from capo.errors import InputError, ParameterError


def check_online(cfg: DictConfig, prompts: int) -> None:
    """InputError where candidates drawn by the policy in training do not go with another value.

    `prompts` is the number of prompts to train on.
    """
    online = cfg.get("online")  # a stored configuration may lack the key
    if not online:
        return
    if online.every is None:
        if idle := [f"online.{key}={online[key]}" for key in ("prompts", "keep") if online[key]]:
            raise InputError(
                f"{' '.join(idle)} without online.every: there is one round alone, of the base's candidates; "
                "give online.every=STEPS, or leave it out"
            )
        return
    refused = {
        "pool.imported: no policy draws the images of an imported pool": bool(cfg.pool.imported),
        "selection.swap=true: a negative model does not draw images by itself": is_negative(cfg),
        "trainer.reuse_reference=true: no other run sees the candidates of this one": bool(
            cfg.trainer.reuse_reference
        ),
        "trainer.ema and reference=generator together: the averaged weights draw the candidates, and no "
        "reference holds them": cfg.trainer.ema is not None and is_generator(cfg),
    }
    for reason, holds in refused.items():
        if holds:
            raise InputError(f"online.every={online.every} does not go with {reason}; leave one of them out")
    if online.prompts is not None and online.prompts > prompts:
        with under("online"):
            must = f"must be at most {prompts}, the number of prompts to train on, or null for all of them"
            raise ParameterError("prompts", online.prompts, must)


def check_reference(cfg: DictConfig) -> None:
    """InputError for an interval of updates where the reference is not updated."""
    reference = cfg.get("reference")  # a stored configuration may lack the key
    if reference and reference.decay is None and reference.interval not in (None, 1):
        raise InputError(
            f"reference.interval={reference.interval} with reference.decay=null: the base stays the "
            f"reference; give reference=ema reference.interval={reference.interval}, or leave it out"
        )


def is_generator(cfg: DictConfig) -> bool:
    """Whether the reference is the policy that drew the candidates of the round (reference=generator)."""
    moving = moving_reference(cfg)
    return moving is not None and not moving.decay and moving.interval == cfg.online.every


def rounds_of(cfg: DictConfig) -> str:
    """Whose candidates the rounds of a run are trained on, in words."""
    count = refreshes(cfg.online.every, cfg.trainer.max_steps)
    some = "" if cfg.online.prompts is None else f" for {cfg.online.prompts} of the prompts in turn"
    later = f"; {count} later, on those that the policy draws at its beginning{some}" if count else ""
    return f"of {cfg.online.every} steps; the first on candidates of the base{later}"

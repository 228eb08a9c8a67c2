"""What the scorers of this package read their weights from, the commits of unpinned hub ids, and versions.

A scorer's argument `weights` goes with `revision`, and any other, such as `clip`, with `clip_revision`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capo.errors import InputError
from capo.rewards import lookup
from capo.runtime.hub import is_commit, is_hub_id, resolved_commit


def read_from(scorer: Any) -> dict[str, tuple[str, str]]:
    """Return argument -> (file, folder or hub id; argument of its revision); empty for others' scorers."""
    if not isinstance(scorer, Mapping) or not str(scorer.get("_target_", "")).startswith("capo.rewards."):
        return {}
    paired = {key: "revision" if key == "weights" else f"{key}_revision" for key in scorer}
    return {
        key: (str(scorer[key]), revision)
        for key, revision in paired.items()
        if revision in scorer and scorer[key]
    }


def unpinned_commits(scorer: Any) -> dict[str, str]:
    """Return argument of a revision -> the commit that it stands for now (`resolved_commit`).

    Only for hub ids whose revision is no commit. One that neither the hub's cache nor the hub knows is left
    out.
    """
    found = {
        revision: resolved_commit(source, scorer[revision])
        for source, revision in read_from(scorer).values()
        if is_hub_id(source) and not Path(source).exists() and not is_commit(scorer[revision])
    }
    return {revision: commit for revision, commit in found.items() if commit}


def check_version(name: str, scorer: Mapping[str, Any], version: int) -> None:
    """Raise InputError if reward `name` declares another `version` than its scorer's class, of this package.

    Otherwise a configuration of an earlier version would store new scores under the fingerprint of old ones.
    """
    target = str(scorer["_target_"])
    has = getattr(lookup.scorer(target), "version", 1) if target.startswith("capo.rewards.") else version
    if has != version:
        raise InputError(
            f"reward '{name}': its configuration is of version {version} of {target}, this package has "
            f"version {has}, whose scores differ; set ++rewards.{name}.version={has} (and "
            f"++evaluation.rewards.{name}.version={has} if it is used there), and its scores are made again"
        )

"""Access to the Hugging Face Hub: look up and download repositories, push a policy, explain a refusal."""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download, is_offline_mode, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from capo.errors import InputError, first_line

LOGIN = "log in with `hf auth login` (or set HF_TOKEN), then run the same command again"
HUB_TIMEOUT = 5.0  # seconds to wait for an answer of the hub
NAME = r"[A-Za-z0-9][\w.-]*"


def check_access(repository: str) -> None:
    """Raise InputError if nothing can be pushed to `repository` (`owner/name`); called before training."""
    place = f"push_to_hub={repository}"
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise InputError(f"{place}: not a repository name ({error}); write owner/name") from error
    if "/" not in repository:
        raise InputError(f"{place}: no owner is named; write owner/name")
    if is_offline_mode():
        raise InputError(f"{place}: HF_HUB_OFFLINE forbids it; unset it, or leave push_to_hub out")
    try:
        HfApi().whoami()
    except (HfHubHTTPError, OSError) as error:
        raise InputError(
            f"{place}: {constants.ENDPOINT} did not accept your login ({first_line(error)}); "
            "hf auth login, with a token that has write access"
        ) from error
    except Exception as error:  # the hub client's other errors, of the network, share no base class
        raise InputError(
            f"{place}: {constants.ENDPOINT} cannot be reached ({first_line(error)}); run the same command "
            "with a network, or leave push_to_hub out"
        ) from error


def push(folder: Path, repository: str) -> str:
    """Upload the files of `folder` to `repository` and return its URL; a new repository is private.

    Raises InputError if the hub refuses; files uploaded before that stay, and running the same command again
    uploads the rest.
    """
    try:
        HfApi().create_repo(repository, private=True, exist_ok=True)
        return str(
            HfApi().upload_folder(repo_id=repository, folder_path=folder, commit_message="capo policy")
        )
    except Exception as error:  # the hub client's errors share no base class
        raise InputError(
            f"push_to_hub={repository}: {first_line(error)}; the policy itself is saved in {folder}, and the "
            "same command uploads it"
        ) from error


def hub_file(hub: str, file: str, revision: str | None, key: str) -> Path:
    """Return the path, in the hub's cache, of `file` of the data set `hub`; download it if it is not cached.

    Args:
        hub: id of the data set, owner/name.
        file: path of the file in the repository.
        revision: a commit, branch or tag; None: the current state of main.
        key: the part of the configuration that reads the file, `prompts.train` say, for messages.

    Raises:
        InputError: the file is not available (no network, no such repository, revision or file, not logged
            in, conditions not accepted); the message says which, and what to do.
    """
    try:
        return Path(hf_hub_download(hub, file, repo_type="dataset", revision=revision))
    except Exception as error:  # the hub client's errors share no base class
        raise InputError(
            f"{key}: file '{file}' of the data set '{hub}' (revision {revision or 'main'}) is not "
            f"available: {_reason(error, hub)}\n  or give a file of your own: {key}.path=FILE"
        ) from error


def _reason(error: Exception, hub: str) -> str:
    """Say what went wrong and what to do; subclasses are tested before their base classes."""
    page = f"{constants.ENDPOINT}/datasets/{hub}"
    if isinstance(error, GatedRepoError):
        return f"it is gated; accept its conditions at {page}, {LOGIN}"
    if isinstance(error, RepositoryNotFoundError):
        return f"the hub has no such data set, or it is private; look at {page}, and if it is yours, {LOGIN}"
    if isinstance(error, RevisionNotFoundError):
        return f"it has no such revision; {page} lists its commits"
    if isinstance(error, HFValidationError):
        return "that is not the id of a data set; write owner/name"
    if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
        offline = (
            "HF_HUB_OFFLINE forbids downloads"
            if constants.HF_HUB_OFFLINE
            else f"{constants.ENDPOINT} cannot be reached"
        )
        return (
            f"it is not in the hub's cache ({constants.HF_HUB_CACHE}), and {offline}; run the same command "
            "once with a network, or use a cache copied from elsewhere: HF_HOME=FOLDER before the command"
        )
    if isinstance(error, EntryNotFoundError):
        return f"the data set has no such file; {page}/tree/main lists its files"
    return f"{first_line(error)}; what was downloaded is kept, and running the same command again resumes"


def is_hub_id(text: str, owned: bool = True) -> bool:
    """Whether `text` has the form owner/name; a name alone counts too unless `owned`."""
    return re.fullmatch(rf"{NAME}/{NAME}" if owned else rf"{NAME}(/{NAME})?", text) is not None


def cached_snapshot(repository: str, revision: str | None) -> Path | None:
    """Return the snapshot of a model repository in the hub's cache, complete or not, or None."""
    try:
        return Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except (OSError, ValueError) as error:
        # A download by patterns lacks the repository's other files; where the cache knows which files there
        # are, the library refuses it, and names the snapshot (IncompleteSnapshotError, huggingface_hub 2).
        incomplete = getattr(error, "snapshot_path", None)
        return Path(incomplete) if incomplete else None


def is_commit(revision: str | None) -> bool:
    """Whether a revision names a commit, 40 hex digits, and not a branch or tag, which may move."""
    return re.fullmatch(r"[0-9a-f]{40}", revision or "") is not None


@cache
def resolved_commit(repository: str, revision: str | None) -> str | None:
    """Return the commit that a branch or tag (None: main) of a model repository stands for, or None.

    The hub's cache is asked first, so that the answer stays while the cache does, with or without a network.
    Else the hub's answer is noted in the cache; no file is downloaded. None: neither knows it.
    """
    folder = cached_snapshot(repository, revision)
    if folder is None and not is_offline_mode():
        try:
            folder = Path(snapshot_download(repository, revision=revision, allow_patterns=[]))
        except Exception:  # the hub client's errors share no base class; loading the weights will say why
            return None
    return folder.name if folder else None


def download_command(repository: str, revision: str | None, patterns: Sequence[str]) -> str:
    """Return the shell command that downloads the files matching `patterns`; no pattern: all files."""
    parts = [f"hf download {repository}", *([f"--revision {revision}"] if revision else [])]
    return " ".join([*parts, *(f"--include '{pattern}'" for pattern in patterns)])


def hub_refusal(weights: str, revision: str | None) -> str | None:
    """Return the reason why the model repository `weights` cannot be downloaded, or None if it can be."""
    if is_offline_mode():
        return "not asked, because HF_HUB_OFFLINE is set"
    try:
        information = HfApi().model_info(weights, revision=revision, timeout=HUB_TIMEOUT)
        if information.gated:
            HfApi().auth_check(weights)
    except GatedRepoError:
        return (
            f"gated, and you have no access: accept the license on {constants.ENDPOINT}/{weights}, "
            "then hf auth login"
        )
    except HfHubHTTPError as error:
        return f"answers: {first_line(error)}"
    except Exception as error:  # the hub client's other errors share no base class
        return f"cannot be reached: {first_line(error)}"
    return None

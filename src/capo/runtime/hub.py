"""A finished policy to the hub, when it is asked for."""

from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download, is_offline_mode
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


def check_access(repository: str) -> None:
    """InputError where nothing can be pushed to `repository` (`owner/name`): found out before training."""
    place = f"push_to_hub={repository}"
    try:
        validate_repo_id(repository)
        if is_offline_mode():
            raise InputError(f"{place}: HF_HUB_OFFLINE forbids it; unset it, or leave push_to_hub out")
        HfApi().whoami()
    except HFValidationError as error:
        raise InputError(f"{place}: no name of a repository ({error}); write owner/name") from error
    except (HfHubHTTPError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{place}: {constants.ENDPOINT} does not know who you are ({reason}); hf auth login, with a token that writes"
        ) from error


def push(folder: Path, repository: str) -> str:
    """Uploads the files of `folder` to `repository`, which is created private where there is none; returns its address.

    Raises InputError where the hub refuses; what was uploaded before stays, and the same command goes on.
    """
    try:
        HfApi().create_repo(repository, private=True, exist_ok=True)
        return str(
            HfApi().upload_folder(repo_id=repository, folder_path=folder, commit_message="capo policy")
        )
    except (HfHubHTTPError, OSError) as error:
        raise InputError(
            f"push_to_hub={repository}: {str(error).splitlines()[0]}; the policy itself is in {folder}"
        ) from error


LOGIN = "log in with `hf auth login` (or set HF_TOKEN), then give the same command again"


def hub_file(hub: str, file: str, revision: str | None, split: str) -> Path:
    """Where `file` of the data set `hub` lies in the hub's cache, downloaded if need be.

    revision: a commit, branch or tag; None: main, whatever it holds that day. Raises InputError that says what was looked for
    and what to do where it is not to be had: no network, no such thing, not logged in, conditions not accepted.
    """
    try:
        return Path(hf_hub_download(hub, file, repo_type="dataset", revision=revision))
    except Exception as error:  # the errors of the hub's client have no class in common
        raise InputError(
            f"prompts.{split}: file '{file}' of the data set '{hub}' (revision {revision or 'main'}) is not to be had: "
            f"{_reason(error, hub)}\n  or give a file of your own: prompts.{split}.path=FILE"
        ) from error


def _reason(error: Exception, hub: str) -> str:
    """What went wrong and its remedy; the classes from the narrow to the wide, since some are kinds of others."""
    page = f"{constants.ENDPOINT}/datasets/{hub}"
    if isinstance(error, GatedRepoError):
        return f"it is gated; accept its conditions at {page}, {LOGIN}"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"the hub knows no such data set, or it is private; look at {page}, and if it is yours, {LOGIN}"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"it has no such revision; {page} lists its commits"
    if isinstance(error, HFValidationError):
        return "that is no id of a data set; write owner/name"
    if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
        offline = (
            "HF_HUB_OFFLINE says not to ask the hub"
            if constants.HF_HUB_OFFLINE
            else f"{constants.ENDPOINT} cannot be reached"
        )
        return (
            f"it is not in the hub's cache ({constants.HF_HUB_CACHE}), and {offline}; give the same command once with a network, "
            "or a cache copied from elsewhere: HF_HOME=FOLDER before the command"
        )
    if isinstance(error, EntryNotFoundError):
        return f"the data set has no such file; {page}/tree/main lists its files"
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{said}; what has come is kept, and the same command goes on"


HUB_TIMEOUT = 5.0  # seconds that the hub has for an answer


def hub_refusal(weights: str, revision: str | None) -> str | None:
    """Why the hub does not hand the repository out; None where it does."""
    if is_offline_mode():
        return "not asked, because HF_HUB_OFFLINE says so"
    try:
        information = HfApi().model_info(weights, revision=revision, timeout=HUB_TIMEOUT)
        if information.gated:
            HfApi().auth_check(weights)
    except GatedRepoError:
        return f"gated, and no access from here: accept the license on {constants.ENDPOINT}/{weights}, then hf auth login"
    except HfHubHTTPError as error:
        return f"answers: {first_line(error)}"
    except Exception as error:  # the others of the hub's client have no class in common
        return f"cannot be reached: {first_line(error)}"
    return None

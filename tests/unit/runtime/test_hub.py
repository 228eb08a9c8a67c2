from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from huggingface_hub.errors import HfHubHTTPError

from capo.errors import InputError
from capo.runtime import hub


def refused(*args, **kwargs):
    request = httpx.Request("GET", "https://huggingface.co/api/whoami-v2")
    raise HfHubHTTPError(
        "401 Client Error: Unauthorized\nmore", response=httpx.Response(401, request=request)
    )


@pytest.fixture
def online(monkeypatch):
    monkeypatch.setattr(hub, "is_offline_mode", lambda: False)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a/b/c", "not a repository name"),
        ("a b", "not a repository name"),
        ("it", "push_to_hub=it: no owner is named; write owner/name"),
    ],
)
def test_a_name_that_is_none_is_refused_before_the_login_is_asked_for(online, monkeypatch, name, message):
    monkeypatch.setattr(hub.HfApi, "whoami", refused)
    with pytest.raises(InputError, match=message):
        hub.check_access(name)


def test_without_a_token_the_remedy_is_said(online, monkeypatch):
    monkeypatch.setattr(hub.HfApi, "whoami", refused)
    with pytest.raises(
        InputError, match=r"push_to_hub=me/it: .*401 Client Error: Unauthorized\); hf auth login"
    ):
        hub.check_access("me/it")


def unreached(*args, **kwargs):
    raise httpx.ConnectError("Name or service not known")


def test_a_hub_that_cannot_be_reached_is_told_before_and_at_the_push(online, monkeypatch, tmp_path):
    monkeypatch.setattr(hub.HfApi, "whoami", unreached)
    with pytest.raises(InputError, match=r"cannot be reached \(Name or service .* leave push_to_hub out"):
        hub.check_access("me/it")
    monkeypatch.setattr(hub.HfApi, "create_repo", unreached)
    with pytest.raises(InputError, match=r"Name or service .* and the same command uploads it"):
        hub.push(tmp_path, "me/it")


def test_offline_nothing_can_be_pushed(monkeypatch):
    monkeypatch.setattr(hub, "is_offline_mode", lambda: True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE forbids it"):
        hub.check_access("me/it")


def test_a_policy_goes_to_a_private_repository(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(hub.HfApi, "create_repo", lambda self, name, **options: calls.append((name, options)))
    monkeypatch.setattr(
        hub.HfApi, "upload_folder", lambda self, **options: calls.append(options) or "https://hub/me/it"
    )
    assert hub.push(tmp_path, "me/it") == "https://hub/me/it"
    assert calls[0] == ("me/it", {"private": True, "exist_ok": True})
    assert calls[1]["repo_id"] == "me/it" and Path(calls[1]["folder_path"]) == tmp_path


def test_a_refused_push_says_where_the_policy_is(monkeypatch, tmp_path):
    monkeypatch.setattr(hub.HfApi, "create_repo", refused)
    with pytest.raises(
        InputError, match=f"push_to_hub=me/it: 401 .*; the policy itself is saved in {tmp_path}"
    ):
        hub.push(tmp_path, "me/it")


COMMIT = "c" * 40


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    hub.resolved_commit.cache_clear()
    yield tmp_path / "models--me--it"
    hub.resolved_commit.cache_clear()


def test_a_branch_in_the_cache_stands_for_its_commit_there(hub_cache, online, monkeypatch):
    (hub_cache / "snapshots" / COMMIT).mkdir(parents=True)
    (hub_cache / "refs").mkdir()
    for name in ("main", "v1"):
        (hub_cache / "refs" / name).write_text(COMMIT)
    asked = []
    real = hub.snapshot_download
    monkeypatch.setattr(
        hub, "snapshot_download", lambda *given, **named: asked.append(named) or real(*given, **named)
    )
    assert hub.resolved_commit("me/it", None) == hub.resolved_commit("me/it", "v1") == COMMIT
    assert all(named["local_files_only"] for named in asked)  # the hub is not asked


def test_a_branch_that_is_not_in_the_cache_is_asked_for_once_and_noted(hub_cache, online, monkeypatch):
    asked = []

    def answers(self, repo_id, **named):
        asked.append(repo_id)
        return SimpleNamespace(sha=COMMIT)

    monkeypatch.setattr(hub.HfApi, "repo_info", answers)
    monkeypatch.setattr(hub.HfApi, "list_repo_tree", lambda self, **named: [])
    assert hub.resolved_commit("me/it", None) == hub.resolved_commit("me/it", None) == COMMIT
    assert asked == ["me/it"] and (hub_cache / "refs" / "main").read_text() == COMMIT


def test_a_branch_that_nobody_knows(hub_cache, monkeypatch):
    assert hub.resolved_commit("me/it", None) is None  # offline
    hub.resolved_commit.cache_clear()
    monkeypatch.setattr(hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(hub.HfApi, "repo_info", refused)
    assert hub.resolved_commit("me/it", None) is None


@pytest.mark.parametrize(
    ("revision", "whole"), [(COMMIT, True), (None, False), ("main", False), ("c" * 39, False)]
)
def test_a_commit_has_40_digits(revision, whole):
    assert hub.is_commit(revision) is whole

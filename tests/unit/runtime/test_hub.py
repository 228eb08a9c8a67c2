from pathlib import Path

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
    ("name", "message"), [("a/b/c", "not a repository name"), ("a b", "not a repository name")]
)
def test_a_name_that_is_none_is_refused(online, name, message):
    with pytest.raises(InputError, match=message):
        hub.check_access(name)


def test_without_a_token_the_remedy_is_said(online, monkeypatch):
    monkeypatch.setattr(hub.HfApi, "whoami", refused)
    with pytest.raises(
        InputError, match=r"push_to_hub=me/it: .*401 Client Error: Unauthorized\); hf auth login"
    ):
        hub.check_access("me/it")


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

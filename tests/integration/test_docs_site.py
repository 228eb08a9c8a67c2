"""The documentation builds as a site, with every link resolved, and needs no network for it."""

import os
import re
import subprocess
import sys

import pytest

from fixtures import ROOT

PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md"))


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    # a proxy that answers nothing: a build that fetched something would fail
    nowhere = {
        name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
    }
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, env=os.environ | nowhere, capture_output=True, text=True)
    assert "No module named mkdocs" not in built.stderr, (
        "install the site's packages: pip install -e '.[docs]'"
    )
    assert built.returncode == 0, built.stderr
    site = {str(path.relative_to(tmp_path / "site")) for path in (tmp_path / "site").rglob("index.html")}
    assert {"index.html", "architecture/index.html", "extending/index.html"} <= site
    assert "capo.objectives.pairwise.capo" in (tmp_path / "site/api/objectives/index.html").read_text()
    page = (tmp_path / "site/architecture/index.html").read_text()
    assert not re.findall(r'<(?:script|img|link)[^>]+(?:src|href)="https?://', page), (
        "a page fetches from elsewhere"
    )


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda path: str(path.relative_to(ROOT)))
def test_links_resolve_in_the_repository(page):
    prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{target}: no such file"
        if anchor:
            assert anchor in anchors(linked), f"{target}: no such heading"


def anchors(page):
    """Anchors of the headings of `page`, as GitHub and mkdocs make them of plain words."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_every_package_of_the_api_has_a_page():
    named = re.findall(r"^::: (capo[\w.]+)$", "\n".join(page.read_text() for page in PAGES), flags=re.M)
    assert {name.split(".")[1] for name in named} == {
        "objectives",
        "calibration",
        "pairs",
        "noise",
        "soup",
        "metrics",
        "win_rates",
        "module",
        "data",
        "backbones",
        "rewards",
        "evaluation",
        "training",
    }
    for name in named:
        source = ROOT / "src" / name.replace(".", "/")
        assert source.with_suffix(".py").is_file() or (source / "__init__.py").is_file(), name

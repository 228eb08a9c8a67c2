"""Where prompts come from.

Paths, patterns, folders, the hub's cache, and what a configuration may say of them.
"""

import httpx
import pytest
from huggingface_hub import errors
from omegaconf import OmegaConf

from capo.cli.build import prompt_splits
from capo.data.prompts import missing_inputs
from capo.data.prompts.sources import source_of
from capo.errors import InputError
from capo.runtime import hub
from fixtures.configuration import composed

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(("path", "expected"), [
    ("a.txt", [("a.txt", "text")]),
    ("t.CSV", [("t.CSV", "csv")]),
    ("*.parquet", [("x-0.parquet", "parquet"), ("x-1.parquet", "parquet")]),
    ("texts", [("texts", "folder")]),
    ("shards", [("1.ndjson", "jsonl"), ("2.jsonl", "jsonl")]),
])  # fmt: skip
def test_local_files_and_their_formats(tmp_path, path, expected):
    for name in (
        "a.txt",
        "t.CSV",
        "x-1.parquet",
        "x-0.parquet",
        "texts/1.txt",
        "shards/2.jsonl",
        "shards/1.ndjson",
        "shards/notes.md",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = source_of("train", {"path": str(tmp_path / path)}).files()
    assert sorted((file.path.name, file.form) for file in found) == expected
    assert all(file.place.startswith(f"prompts.train.path={tmp_path}") for file in found)
    assert found == source_of("train", str(tmp_path / path)).files()


@pytest.mark.parametrize(("given", "message"), [
    ({"path": "gone.txt"},
     "prompts.test.path=gone.txt: no such file or folder; give the path of a text file"),
    ({"path": "gone-*.txt", "origin": "GenEval's jsonl"},
     r"prompts.test.path=gone-\*.txt: no file matches; give"),
    ({"path": "notes.md"},
     "notes.md: its extension tells no format; name it: prompts.test.format= one of text, folder, csv"),
    ({"path": "a.csv", "format": "folder"}, "a.csv: a file, but prompts.test.format=folder"),
    ({"path": "empty"}, "empty: a folder without prompts"),
    ({"path": "empty", "format": "parquet"}, "empty: no .parquet in this folder"),
    ({"path": "mixed"}, r"mixed: holds files of 2 formats \(csv, text\); name one: prompts.test.format="),
    ({}, "prompts.test: neither a path nor a hub data set"),
    ({"hub": "owner/name"}, "prompts.test: neither a path nor a hub data set"),
    ({"path": "a.csv", "colum": "text"}, "prompts.test.colum: no such key; did you mean column?"),
    ({"path": "a.csv", "limit": 0}, "prompts.test.limit=0: must be a whole number of at least 1"),
    ({"path": "a.csv", "max_length": 1.5}, "prompts.test.max_length=1.5: must be a whole number"),
    ({"path": "a.csv", "format": "excel"}, "prompts.test.format=excel: must be one of text"),
    ({"path": "a.csv", "nsfw": True}, "prompts.test.nsfw=True: must be a finite number"),
    ({"path": "a.csv", "nsfw_columns": "nsfw"}, "prompts.test.nsfw_columns=nsfw: must be a list"),
    ({"path": "a.csv", "where": {"tag": ["x", "y"]}}, "must be a mapping .* one value each"),
    (7, "prompts.test=7: must be the path of"),
])  # fmt: skip
def test_sources_that_cannot_be_used(tmp_path, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    for name in ("empty/", "mixed/a.csv", "mixed/b.txt", "notes.md", "a.csv"):
        folder, _, file = name.rpartition("/")
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / (file or ".keep")).touch()
    with pytest.raises(InputError, match=message):
        source_of("test", given).files()


def test_columns_by_name_and_by_default():
    there = ["image", "Prompt", "tag", "Image_NSFW", "is_unsafe", "label"]
    columns = source_of("train", {"path": "a", "category": "tag", "where": {"label": 1}}).columns(
        there, "here"
    )
    assert columns.all == ["Prompt", "tag", "Image_NSFW", "is_unsafe", "label"] and columns.nsfw == (
        "Image_NSFW",
        "is_unsafe",
    )
    assert source_of("train", {"path": "a", "nsfw": None}).columns(there, "here").all == ["Prompt"]
    assert source_of("train", {"path": "a", "column": "tag", "nsfw_columns": []}).columns(
        there, "here"
    ).all == ["tag"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"column": "text"}, r"here: no column 'text' \(prompts.train.column\); there are caption, tag"),
        (
            {"column": "caption", "category": "Tag"},
            r"here: no column 'Tag' \(prompts.train.category\); there are caption, tag",
        ),
        ({"column": "caption", "nsfw_columns": ["nsfw"]}, r"no column 'nsfw' \(prompts.train.nsfw_columns\)"),
        (
            {"column": "caption", "where": {"has_label": True}},
            r"no column 'has_label' \(prompts.train.where\)",
        ),
        ({}, "here: no column is called prompt; name one: prompts.train.column= one of caption, tag"),
    ],
)
def test_columns_that_are_missing(given, message):
    with pytest.raises(InputError, match=message):
        source_of("train", {"path": "a", **given}).columns(["caption", "tag"], "here")


def test_two_columns_called_prompt_need_a_name():
    given = {"path": "a", "column": None}
    with pytest.raises(InputError, match=r"columns Prompt and prompt hold prompts; .*column=Prompt$"):
        source_of("train", given).columns(["Prompt", "prompt"], "here")
    assert (
        source_of("train", given | {"column": "prompt"}).columns(["Prompt", "prompt"], "here").text
        == "prompt"
    )


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty cache, for which `hf_hub_download` still is the library's own; no network (conftest)."""
    own = hub.hf_hub_download
    monkeypatch.setattr(
        hub, "hf_hub_download", lambda *names, **options: own(*names, cache_dir=tmp_path, **options)
    )
    return tmp_path


def test_a_hub_file_that_is_in_the_cache(hub_cache):
    file = hub_cache / "datasets--owner--name" / "snapshots" / COMMIT / "data" / "a.csv"
    file.parent.mkdir(parents=True)
    file.write_text("prompt\na circle\n")
    (found,) = source_of("train", {"hub": "owner/name", "file": "data/a.csv", "revision": COMMIT}).files()
    assert (found.path, found.form, found.place) == (file, "csv", "prompts.train: owner/name/data/a.csv")


def test_a_hub_file_that_is_not_to_be_had_offline(hub_cache):
    with pytest.raises(
        InputError,
        match=r"(?s)prompts.train: file 'a.csv' of the data set 'owner/name' \(revision main\) is not "
        r"available: it is not in the hub's cache .*HF_HUB_OFFLINE forbids downloads.*"
        r"or give a file of your own: prompts.train.path",
    ):
        source_of("train", {"hub": "owner/name", "file": "a.csv"}).files()
    with pytest.raises(InputError, match="not the id of a data set; write owner/name"):
        source_of("train", {"hub": "owner/name/more", "file": "a.csv"}).files()


@pytest.mark.parametrize(("kind", "message"), [
    (errors.GatedRepoError,
     "it is gated; accept its conditions at https://.*/datasets/owner/name, log in with `hf auth login`"),
    (errors.RepositoryNotFoundError, "has no such data set, or it is private; .* `hf auth login`"),
    (errors.RevisionNotFoundError, "no such revision"),
    (errors.RemoteEntryNotFoundError, "has no such file"),
    (errors.HfHubHTTPError, "500 of the hub; what was downloaded is kept"),
])  # fmt: skip
def test_what_the_hub_answers_becomes_a_remedy(monkeypatch, kind, message):
    def refuse(*_, **__):
        raise kind(
            "500 of the hub\nmore", response=httpx.Response(500, request=httpx.Request("GET", "https://hub"))
        )

    monkeypatch.setattr(hub, "hf_hub_download", refuse)
    with pytest.raises(InputError, match=f"prompts.test: .*{message}"):
        source_of("test", {"hub": "owner/name", "file": "a.csv"}).files()


def test_missing_inputs_are_named_with_what_they_are():
    given = {"train": "???", "test": {"path": "???", "origin": "GenEval's jsonl"}, "validation": "???"}
    assert missing_inputs(
        ["prompts.test.path", "prompts.train", "prompts.validation"], given
    ).splitlines() == [
        "prompts.test.path: not given; the path of GenEval's jsonl, e.g. prompts.test.path=FILE",
        "  prompts.train, prompts.validation: not given; each is the path of a UTF-8 text file with one "
        "prompt per line, e.g. prompts.train=FILE",
    ]


@pytest.mark.parametrize(
    ("name", "key", "what"),
    [
        ("parti", "train", "a text file"),
        ("pickapic", "train", "Pick-a-Pic"),
        ("dpg", "test", "DPG-Bench"),
        ("geneval", "test", "GenEval"),
    ],
)
def test_a_set_without_a_public_file_asks_for_it(name, key, what):
    with pytest.raises(
        InputError,
        match=rf"^prompts.{key}.path: not given; the path of {what}.* e.g. prompts.{key}.path=FILE$",
    ):
        prompt_splits(composed(f"prompts={name}"))


@pytest.mark.parametrize("name", ["diffusiondb", "parti", "pickapic", "dpg", "geneval", "files"])
def test_every_source_in_the_configuration_can_be_built(name):
    cfg = composed(
        f"prompts={name}", *(f"prompts.{split}.path=FILE" for split in ("train", "validation", "test"))
    )
    for split in ("train", "validation", "test"):
        source = source_of(
            split,
            dict(cfg.prompts[split]) | {"where": dict(cfg.prompts[split].where or {}), "nsfw_columns": None},
        )
        assert source.path == "FILE" and source.nsfw == 0.5


def test_conditions_of_rows_are_given_on_the_command_line():
    assert composed("prompts=files", "prompts.train.where={x: 3}").prompts.train.where == {"x": 3}


def test_the_papers_setting():
    prompts = composed("prompts=diffusiondb").prompts
    assert (prompts.train.hub, prompts.train.file, prompts.train.limit) == (
        "poloclub/diffusiondb",
        "metadata.parquet",
        100_000,
    )  # CaPO, B.1
    assert list(prompts.train.nsfw_columns) == ["image_nsfw", "prompt_nsfw"]
    assert (
        list(prompts.priority) == ["validation", "test", "train"]
        and prompts.validation.limit == 232
        and prompts.test.limit is None
    )
    other = composed(
        "prompts=geneval", "prompts/source@prompts.train=pickapic", "prompts.train.path=x"
    ).prompts
    assert other.train.column == "caption" and other.train.limit == 100_000 and other.test.name == "GenEval"


MINE = """
from capo.data.prompts import Prompt, make_prompt

a, b, c = map(make_prompt, ["a star", "a cross", "a circle"])

def source(kind):
    return {
        "strings": lambda: {"train": ["a star"], "validation": ["a cross"], "test": ["a circle"]},
        "text": lambda: {"train": "a star", "validation": [b], "test": [c]},
        "names": lambda: {"train": [a], "valid": [b], "test": [c]},
        "four": lambda: {"train": [a], "validation": [b], "test": [c], "more": [c]},
        "list": lambda: [a, b, c],
        "generator": lambda: {"train": (p for p in [a]), "validation": [b], "test": [c]},
        "id": lambda: {"train": [a, Prompt("7", "a ring")], "validation": [b], "test": [c]},
        "space": lambda: {"train": [a, Prompt(a.id, "a  star")], "validation": [b], "test": [c]},
        "number": lambda: {"train": [a, Prompt(a.id, 7)], "validation": [b], "test": [c]},
        "half": lambda: {"train": [a, Prompt(a.id, chr(0xD800))], "validation": [b], "test": [c]},
        "raises": lambda: [].pop(),
        "fine": lambda: {"test": (c,), "train": [a], "validation": [b]},
    }[kind]()
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "prompts_of_mine.py").write_text(MINE, encoding="utf-8")
    (tmp_path / "prompts_of_nobody.py").write_text("def source(:", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return lambda kind, module="prompts_of_mine": prompt_splits(
        OmegaConf.create({"prompts": {"_target_": f"{module}.source", "kind": kind}})
    )


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("strings", ": train prompt 1 is 'a star'; it must return .* make each one with .*make_prompt"),
        ("text", ": train prompt 1 is 'a'; it must return a list of Prompt"),
        (
            "names",
            " returned the splits 'train', 'valid', 'test'; it must return .* for each of train, valid",
        ),
        ("four", " returned the splits 'train', 'validation', 'test', 'more'; it must return"),
        ("list", " returned a list; it must return a list of Prompt for each of train, validation and test"),
        ("generator", ": 'train' is a generator; it must return a list of Prompt"),
        (
            "id",
            r": train prompt 2 is Prompt\(id='7'.*which is not what make_prompt makes.* make each one with",
        ),
        ("space", r": train prompt 2 is Prompt\(.*which is not what make_prompt makes"),
        ("number", r": train prompt 2 is Prompt\(.*make each one with"),
        ("half", r": train prompt 2 is Prompt\(.*ud800.*make each one with"),
        ("raises", r" failed \(IndexError: pop from empty list\).*HYDRA_FULL_ERROR=1"),
    ],
)
def test_what_a_source_of_ones_own_may_not_return_is_named(mine, kind, message):
    with pytest.raises(InputError, match=rf"^prompts: prompts_of_mine\.source{message}"):
        mine(kind)


def test_a_source_of_ones_own_gives_its_prompts(mine):
    assert [prompt.text for prompt in mine("fine")["test"]] == ["a circle"]


def test_a_module_that_is_no_python_is_named(mine):
    message = r"^prompts._target_=prompts_of_nobody\.source: importing it failed \(SyntaxError: "
    with pytest.raises(InputError, match=message):
        mine("fine", "prompts_of_nobody")

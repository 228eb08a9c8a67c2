"""Writing the trees of benchmarks: killed and continued, with seeds and a README, and what is refused."""

import csv
import os
from dataclasses import replace

import pytest
from PIL import Image

from capo.data.prompts import candidate_seed, make_prompt
from capo.errors import InputError
from capo.evaluation.benchmarks import Picture, geneval
from capo.evaluation.benchmarks.tree import claim, readme, write_seeds, write_tree
from fixtures.benchmarks import HARD, drawn, files, geneval_list, written


def test_a_killed_export_goes_on_and_leaves_nothing_else(tmp_path, monkeypatch):
    benchmark = geneval(str(geneval_list(tmp_path)), images=2)
    images, tree = drawn(benchmark, tmp_path / "pool"), tmp_path / "tree"
    save, saved = Image.Image.save, []

    def dies(self, *arguments, **given):
        save(self, *arguments, **given)
        saved.append(arguments)
        if len(saved) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        write_tree(benchmark, images, tree, progress=False)
    monkeypatch.undo()
    pictures = [path for path in tree.rglob("*.png")]
    assert len(pictures) == 3 and len(files(tree)) == 3 + 5  # whole ones alone, and all metadata
    before = {path: path.stat().st_mtime_ns for path in pictures}
    write_tree(benchmark, images, tree, progress=False)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert len(files(tree)) == 15
    text = tree / next(iter(benchmark.texts))
    text.unlink()
    os.mkfifo(text)
    with pytest.raises(InputError, match=f"{text} is no ordinary file"):  # and it is not waited for
        write_tree(benchmark, images, tree, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation_metadata.jsonl", "pool", "tree"]


def test_seeds_are_written_beside_the_trees(tmp_path):
    benchmark = geneval(str(geneval_list(tmp_path)), images=2)
    write_seeds(benchmark, 7, tmp_path)
    with (tmp_path / "images.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10
    assert rows[3] == {
        "file": "00001/samples/00001.png",
        "image": "1",
        "seed": str(candidate_seed(7, make_prompt(HARD[1]).id, 1)),
        "prompt_id": make_prompt(HARD[1]).id,
        "category": "position",
        "prompt": HARD[1],
    }
    text = readme(benchmark, tmp_path / "a b", {"policy": {"seed": 7}}, (64, 64), ["benchmark=geneval"])
    assert f"evaluate_images.py '{tmp_path}/a b/images/policy' --outfile" in text
    assert "python evaluate.py benchmark=geneval 'results=[POLICY]'" in text


def test_images_of_something_else_are_not_mixed(tmp_path):
    claim(tmp_path, "policy", {"seed": 1, "denoiser": "a"})
    claim(tmp_path, "base", {"seed": 1, "denoiser": "b"})
    claim(tmp_path, "policy", {"seed": 1, "denoiser": "a"})
    with pytest.raises(
        InputError, match=r"images/policy holds other images:\s+denoiser: a -> c\s+move .* away, or"
    ):
        claim(tmp_path, "policy", {"seed": 1, "denoiser": "c"})
    (tmp_path / "images" / "other").mkdir(parents=True)
    with pytest.raises(InputError, match=r"images/other is there, but benchmark.json does not name it"):
        claim(tmp_path, "other", {"seed": 1})
    (tmp_path / "benchmark.json").write_text("[")
    with pytest.raises(InputError, match=r"benchmark.json cannot be read"):
        claim(tmp_path, "base", {"seed": 1})


def test_paths_that_cannot_be_written_are_refused(tmp_path):
    benchmark = geneval(str(geneval_list(tmp_path)), images=1)
    for path, says in (
        ("../a.png", "outside its folder"),
        ("/a.png", "outside its folder"),
        ("a//b.png", "outside its folder"),
        (f"{'ä' * 130}.png", "would take 264 bytes"),
        ("00000/metadata.jsonl", "stands there twice"),
    ):
        with pytest.raises(InputError, match=says):
            replace(benchmark, pictures=[Picture(path, 0)])


def test_files_of_others_and_links_are_not_written_over(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(InputError, match=r"holds README\.md, but no benchmark\.json of a benchmark"):
        claim(tmp_path, "policy", {"seed": 1})
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "images").symlink_to(tmp_path)
    with pytest.raises(InputError, match="images is a link to"):
        claim(tmp_path / "new", "policy", {"seed": 1})
    assert (tmp_path / "README.md").read_text() == "mine" and not (
        tmp_path / "new" / "benchmark.json"
    ).exists()


def test_lists_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(
        InputError, match=r"benchmark.set.path is not given; give the path of GenEval's prompts/"
    ):
        geneval()
    with pytest.raises(InputError, match=r"benchmark.set.path=/nowhere: no such file"):
        geneval("/nowhere")
    path = tmp_path / "list.jsonl"
    for content, says in (
        ("", "holds no prompt"),
        ('{"tag": "colors", "prompt": "a"}\n{', "line 2 is not JSON"),
        ("[1]", "line 1 is no JSON object"),
        ("[" * 10**5, "line 1 is not JSON: maximum recursion depth"),
        (r'{"tag": "colors", "prompt": "a \ud83d"}', r"line 1 holds half a character, \\ud83d"),
        ('{"tag": "colors"}', "line 1: 'prompt' is None, not text"),
        ('{"tag": "colors", "prompt": " "}', "prompt 0 has no text"),
    ):
        path.write_text(content)
        with pytest.raises(InputError, match=says):
            geneval(str(path))


def test_equal_prompts_share_their_images(tmp_path):
    benchmark = geneval(str(geneval_list(tmp_path, ["a cat", "a dog", "a  cat"])), images=2)
    assert len(benchmark.drawn) == 2 and benchmark.places == [0, 1, 0]
    _, images = written(benchmark, tmp_path)
    assert images[0][1].tobytes() == images[2][1].tobytes()

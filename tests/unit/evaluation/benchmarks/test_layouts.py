"""The trees of benchmarks: as published, and as each official scorer reads them from a disk."""

import csv
import json
import os
import re
from dataclasses import replace

import pytest
from PIL import Image

from capo.backbones.sampling import SamplerSettings
from capo.data.generation import ImageGenerator, PoolSpec
from capo.data.images import GeneratedImages
from capo.data.prompts import candidate_seed, make_prompt
from capo.errors import InputError
from capo.evaluation.benchmarks import Picture, dpg, genai, geneval, hpsv2, parti, t2i_compbench
from capo.evaluation.benchmarks.tree import claim, readme, write_seeds, write_tree
from fixtures.fake_backbone import FakeBackbone

LONG = ("a very long sentence about a cat " * 13)[:400]
HARD = ["a red/blue cat", "one_two __ three", "the \"quoted\" 'cat'", "a cat\r\non a mat", LONG]


def drawn(benchmark, root) -> GeneratedImages:
    """The benchmark's images by a backbone without a network."""
    spec = PoolSpec(root, "fake", benchmark.name, 7, benchmark.drawn, benchmark.images, compared=False)
    generator = ImageGenerator.base(FakeBackbone(), SamplerSettings(steps=1, guidance=1.0, batch=64))
    return GeneratedImages.fill(spec, generator, [], progress=False)


def written(benchmark, folder):
    """Write the tree to `folder`/tree; return it and the images by row of the list."""
    images = drawn(benchmark, folder / "pool")
    tree = folder / "tree"
    write_tree(benchmark, images, tree, progress=False)
    return tree, [images.images(place) for place in benchmark.places]


def files(tree) -> set[str]:
    return {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()}


def metadata(prompts) -> list[dict]:
    return [
        {
            "tag": ("colors", "position")[number % 2],
            "include": [{"class": "cat", "count": 1}],
            "prompt": prompt,
        }
        for number, prompt in enumerate(prompts)
    ]


def geneval_list(folder, prompts=HARD):
    path = folder / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(record) + "\r\n" for record in metadata(prompts)))
    return path


def test_geneval_as_its_scorer_reads_it(tmp_path):
    benchmark = geneval(str(geneval_list(tmp_path)), images=4)
    tree, images = written(benchmark, tmp_path)
    assert files(tree) == {f"{row:05d}/metadata.jsonl" for row in range(5)} | {
        f"{row:05d}/samples/{image:05d}.png" for row in range(5) for image in range(4)
    }
    # the scorer: folders of digits, json.load of the metadata, names of digits in samples
    found = {}
    for folder in os.listdir(tree):
        assert folder.isdigit()
        with open(tree / folder / "metadata.jsonl") as file:
            record = json.load(file)
        for name in os.listdir(tree / folder / "samples"):
            assert re.fullmatch(r"\d+\.png", name)
            place = int(folder), int(name.split(".")[0])
            found[place] = record, Image.open(tree / folder / "samples" / name)
    assert len(found) == len({picture.tobytes() for _, picture in found.values()}) == 20
    for (row, image), (record, picture) in found.items():
        assert record == metadata(HARD)[row]  # complete, with what is scored
        assert picture.tobytes() == images[row][image].tobytes()
    assert benchmark.groups == {"colors": [0, 2, 4], "position": [1, 3]}


def test_dpg_as_its_scorer_reads_it(tmp_path):
    folder = tmp_path / "prompts"
    folder.mkdir()
    names = ["0", "COCOval2014000000000042", "diffusiondb_7", "partiprompts12", "10"]
    for name, prompt in zip(names, HARD, strict=True):
        (folder / f"{name}.txt").write_text(prompt, newline="")
    benchmark = dpg(str(folder))
    tree, images = written(benchmark, tmp_path)
    assert files(tree) == {f"{name}.png" for name in names} and benchmark.images == 4
    order = sorted(names)  # of the files
    resolution = 2  # of the backbone's images
    boxes = [(0, 0), (resolution, 0), (0, resolution), (resolution, resolution)]
    for name in os.listdir(tree):  # the scorer: each entry a picture, called by its item up to the first dot
        item = name.split(".")[0]
        row, picture = order.index(item), Image.open(tree / name)
        assert picture.size == (2 * resolution, 2 * resolution)
        assert benchmark.prompts[row].text == make_prompt(HARD[names.index(item)]).text
        for image, (left, top) in enumerate(boxes):
            tile = picture.crop((left, top, left + resolution, top + resolution))
            assert tile.tobytes() == images[row][image].tobytes()
    (folder / "a.b.txt").write_text("a cat")
    with pytest.raises(InputError, match=r"of the name 'a.b.txt' the scorer reads 'a'"):
        dpg(str(folder))
    oblong = drawn(benchmark, tmp_path / "pool")
    oblong.generator.backbone.decode = lambda latents, batch: [Image.new("RGB", (2, 3))] * len(latents)
    with pytest.raises(InputError, match="takes square images, the model draws 2 x 3"):
        write_tree(benchmark, oblong, tmp_path / "oblong", progress=False)


def t2i_lists(folder, color=("a red cat.", "the \"quoted\" 'cat'"), numeracy=("two dogs",)):
    folder.mkdir(exist_ok=True)
    (folder / "color_val.txt").write_bytes("".join(f"{text}\r\n" for text in color).encode())
    (folder / "numeracy_val.txt").write_text("\n".join(numeracy) + "\n\n")
    return str(folder)


def test_t2i_compbench_as_its_scorers_read_it(tmp_path):
    benchmark = t2i_compbench(t2i_lists(tmp_path / "lists"), ["color", "numeracy"], images=10)
    tree, images = written(benchmark, tmp_path)
    assert files(tree) == {
        *(f"color/samples/a red cat._{image:06d}.png" for image in range(10)),
        *(f"color/samples/the \"quoted\" 'cat'_{image:06d}.png" for image in range(10, 20)),
        *(f"numeracy/samples/two dogs_{image:06d}.png" for image in range(10)),
    }
    prompts = {"color": ["a red cat.", "the \"quoted\" 'cat'"], "numeracy": ["two dogs"]}
    rows = {"color": 0, "numeracy": 2}
    for category in os.listdir(tree):
        names = os.listdir(tree / category / "samples")
        names.sort(key=lambda name: int(name.split("_")[-1].split(".")[0]))  # as BLIP_vqa.py sorts them
        for number, name in enumerate(names):
            row, image = divmod(number, 10)
            assert name.split("_")[0] == prompts[category][row]  # what every scorer takes for the prompt
            # numeracy_eval.py, and the detectors, which take the number from the name
            assert (
                int(name.split(".png")[0].split("_")[1]) == number == int(name.split("_")[-1].split(".")[0])
            )
            picture = Image.open(tree / category / "samples" / name)
            assert picture.tobytes() == images[rows[category] + row][image].tobytes()
    commands = benchmark.official.command.format(tree="'T T'")
    assert commands.splitlines() == [
        "python BLIPvqa_eval/BLIP_vqa.py --out_dir='T T'/color",
        "(cd UniDet_eval && python numeracy_eval.py --outpath='T T'/numeracy)",
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a red/blue cat", "line 1 .* has /: its scorer reads the prompt"),
        ("one_two", "line 1 .* has _: its scorer"),
        ("\r\na cat", "line 1 .* has no text"),
        (LONG, r"name of a file of prompt 0 .* would take 411 bytes"),
    ],
)
def test_prompts_that_no_name_can_hold_are_refused(tmp_path, text, says):
    with pytest.raises(InputError, match=says):
        t2i_compbench(t2i_lists(tmp_path / "lists", (text,)), ["color"])
    with pytest.raises(InputError, match="colour is unknown; there are color, shape"):
        t2i_compbench(str(tmp_path), ["colour"])


def genai_folder(folder, prompts=HARD):
    folder.mkdir(exist_ok=True)
    listed = {f"{row:05d}": {"prompt": prompt, "id": row} for row, prompt in enumerate(prompts)}
    (folder / "genai_image.json").write_text(json.dumps(listed))
    (folder / "genai_skills.json").write_text(json.dumps({"counting": [0, 2], "negation": [2, 3]}))
    return str(folder)


def test_genai_as_its_scorer_reads_it(tmp_path):
    folder = genai_folder(tmp_path / "set")
    benchmark = genai(folder)
    tree, images = written(benchmark, tmp_path)
    assert files(tree) == {f"{row:05d}.jpeg" for row in range(5)} and benchmark.images == 1
    with open(tmp_path / "set" / "genai_image.json") as file:
        dataset = json.load(file)
    for index in dataset:
        path = tree / f"{index}.jpeg"
        assert path.exists()  # asserted by the scorer too
        picture = Image.open(path)
        assert picture.format == "JPEG" and max(max(table) for table in picture.quantization.values()) <= 12
        close = [abs(a - b) for a, b in zip(picture.tobytes(), images[int(index)][0].tobytes(), strict=True)]
        assert max(close) < 12
    assert benchmark.groups == {"counting": [0, 2], "negation": [2, 3]}
    assert list(benchmark.parts["overall"]) == [0, 2, 3]  # each prompt of any skill once
    assert "This list has 5 prompts; the scorer takes 527 or 1600." in benchmark.official.remarks
    (tmp_path / "set" / "genai_skills.json").write_text('{"counting": [5]}')
    with pytest.raises(InputError, match=r"a skill has the prompt 5, which genai_image.json lacks"):
        genai(folder)


def hpsv2_folder(folder, prompts=HARD):
    folder.mkdir(exist_ok=True)
    for style in ("anime", "concept-art", "paintings", "photo"):
        (folder / f"{style}.json").write_text(json.dumps([f"{style} {prompt}" for prompt in prompts]))
    return str(folder)


def test_hpsv2_as_its_scorer_reads_it(tmp_path):
    folder = hpsv2_folder(tmp_path / "lists")
    benchmark = hpsv2(folder)
    tree, images = written(benchmark, tmp_path)
    assert len(files(tree)) == 20
    row = 0
    for style in os.listdir(tree):  # every entry is a style with a list of its name
        with open(f"{folder}/{style}.json") as file:
            annotations = json.load(file)
        for index, prompt in enumerate(annotations):
            picture = Image.open(tree / style / f"{index:05d}.jpg")
            row = next(n for n, held in enumerate(benchmark.prompts) if held.id == make_prompt(prompt).id)
            close = zip(picture.tobytes(), images[row][0].tobytes(), strict=True)
            assert picture.format == "JPEG" and max(abs(a - b) for a, b in close) < 12
    assert sorted(os.listdir(tree)) == ["anime", "concept-art", "paintings", "photo"]
    (tmp_path / "lists" / "photo.json").write_text('{"a": 1}')
    with pytest.raises(InputError, match=r"photo.json: must be a list of texts"):
        hpsv2(folder)


def test_parti_by_category_or_challenge(tmp_path):
    path = tmp_path / "PartiPrompts.tsv"
    rows = [("Prompt", "Category", "Challenge", "Note")]
    rows += [
        (prompt.replace("\r\n", " "), "Animals", f"c{number % 2}", "") for number, prompt in enumerate(HARD)
    ]
    path.write_bytes("".join("\t".join(row) + "\r\n" for row in rows).encode())
    benchmark = parti(str(path), images=2)
    tree, images = written(benchmark, tmp_path)
    assert files(tree) == {f"{row:05d}_{image}.png" for row in range(5) for image in range(2)}
    assert [prompt.text for prompt in benchmark.prompts] == [make_prompt(prompt).text for prompt in HARD]
    assert Image.open(tree / "00003_1.png").tobytes() == images[3][1].tobytes()
    assert benchmark.groups == {"Animals": [0, 1, 2, 3, 4]}
    assert parti(str(path), category="Challenge").groups == {"c0": [0, 2, 4], "c1": [1, 3]}
    with pytest.raises(InputError, match="no column 'Kind'; there are Prompt, Category, Challenge, Note"):
        parti(str(path), category="Kind")


def test_lists_of_the_hub_are_named_by_their_key():
    with pytest.raises(
        InputError, match=r"benchmark.set: file 'PartiPrompts.tsv' .*\n.*benchmark.set.path=FILE"
    ):
        parti()


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
        InputError, match=r"images/policy holds other images:\s+denoiser: a -> c\s+choose anot"
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

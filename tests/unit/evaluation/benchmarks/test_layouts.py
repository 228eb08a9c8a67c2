"""The trees of benchmarks: as published, and as each official scorer reads them from a disk."""

import json
import os
import re

import pytest
from PIL import Image

from capo.data.prompts import make_prompt
from capo.errors import InputError
from capo.evaluation.benchmarks import dpg, genai, geneval, hpsv2, parti, t2i_compbench
from capo.evaluation.benchmarks.tree import write_tree
from fixtures.benchmarks import HARD, LONG, drawn, files, geneval_list, metadata, written


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
    with pytest.raises(InputError, match="colr is unknown; there are color, shape"):
        t2i_compbench(str(tmp_path), ["colr"])


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


def test_names_that_are_no_text_are_refused(tmp_path):
    (tmp_path / os.fsdecode(b"\xff.txt")).write_text("a cat")
    with pytest.raises(
        InputError, match=r"benchmark dpg: the name of file '\\udcff.png' of prompt 0 .* is no UTF-8"
    ):
        dpg(str(tmp_path))

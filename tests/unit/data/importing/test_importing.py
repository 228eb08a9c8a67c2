"""Preference data from elsewhere: hand-made tables and images -> a pool, and training on it."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from capo.backbones.sampling import SamplerSettings
from capo.cli import generate as generate_script
from capo.cli import train as train_script
from capo.data.candidates import TrainingData
from capo.data.dataset import collate
from capo.data.engines import LocalEngine
from capo.data.importing import folder, pickapic, rankings
from capo.data.importing.chosen import Imported
from capo.data.importing.filling import import_pool
from capo.data.importing.images import BrokenImage, picture
from capo.data.importing.ordering import caption_of, dense_ranks, number_of
from capo.data.importing.survey import described, entry_id, survey
from capo.data.importing.tables import RowCursor, Table
from capo.data.labels import HUMAN
from capo.data.pool import Pool
from capo.data.pool.import_table import read_import_table
from capo.data.prompts import prompt_id
from capo.errors import InputError
from capo.objectives import PairErrors, capo, ipo
from capo.pairs import frs, random_pair

SETTINGS = SamplerSettings(steps=2, guidance=1.0, batch=4)


def colored(color, size=(20, 16)):
    """A plain image with a gradient, so that no two parts are the same."""
    pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    pixels[:] = color
    pixels[..., 0] += np.arange(size[0], dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


# caption, winner's side (None: tie, "?": nobody chose); the same caption stands twice on purpose
ROWS = [
    ("a red cat", 1.0),
    ("a blue dog", 0.0),
    ("a  red cat", 0.0),
    ("red cat", 1.0),
    ("a red dog", 0.5),
    ("a blue cat", None),
    ("", 1.0),
    ("the green circle", 0.0),
    ("a green square", 1.0),
    ("the red triangle", 0.0),
]
BROKEN_ROW = 8
KEPT = [0, 1, 2, 3, 7, 9]


def row_images(row):
    return [colored((10 * row, 40, 90)), colored((10 * row, 200, 30))]


def write_pickapic(path, drop=()):
    images = [[encoded(image) for image in row_images(row)] for row in range(len(ROWS))]
    images[BROKEN_ROW][1] = images[BROKEN_ROW][1][:60]  # cut off in the middle
    columns = {
        "jpg_0": pa.array(
            [{"bytes": pair[0], "path": None} for pair in images],
            pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        ),
        "jpg_1": pa.array([pair[1] for pair in images]),
        "label_0": pa.array([label for _, label in ROWS], pa.float64()),
        "caption": [caption for caption, _ in ROWS],
    }
    table = pa.table({name: column for name, column in columns.items() if name not in drop})
    pq.write_table(table, path, row_group_size=3)
    return path


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    return write_pickapic(tmp_path_factory.mktemp("pickapic") / "pairs.parquet")


def imported(source, backbone, root):
    return import_pool(source, backbone, SETTINGS, root, "tiny", prompts_per_shard=2, progress=False)


@pytest.fixture(scope="module")
def pool(parquet, tiny_backbone, tmp_path_factory):
    return imported(pickapic(str(parquet)), tiny_backbone, tmp_path_factory.mktemp("pools"))


def test_what_cannot_be_used_is_counted_and_named(pool):
    report = read_import_table(pool.folder).report
    assert report["entries"] == len(KEPT) == 6 and report["captions"] == 5
    assert report["dropped"] == {
        "ties": 1,
        "without a choice": 1,
        "without a caption": 1,
        "with a broken image": 1,
    }
    assert report["first"].keys() == report["dropped"].keys() - {"with a broken image"}
    assert f"1 ties (the first: {report['first']['ties']})" in described(report)
    assert len(report["broken"]) == 1 and report["broken"][0].startswith("pairs.parquet row 9, jpg_1: ")


def test_a_caption_that_stands_twice_is_two_prompts(pool):
    prompts = [prompt for prompt, _ in pool.prompts]
    captions = ["a red cat", "a blue dog", "a red cat", "red cat", "the green circle", "the red triangle"]
    assert [prompt.text for prompt in prompts] == captions
    assert prompts[0].id == prompt_id("a red cat") == entry_id("a red cat", 0)
    assert prompts[2].id == entry_id("a red cat", 1) != prompts[0].id


def test_scores_are_the_choices(pool):
    # label_0 of the kept rows: 1, 0, 0, 1, 0, 0; the chosen image has 1, the other 0
    assert pool.scores([HUMAN.key], 2)[..., 0].tolist() == [[1, 0], [0, 1], [0, 1], [1, 0], [0, 1], [0, 1]]


def test_latents_are_the_encoders_own(pool, tiny_backbone):
    for shard in pool.shards(2):
        images = [image for position in shard.positions for image in row_images(KEPT[position])]
        # 20 x 16 to 16 x 16: the middle is cut out, nothing is scaled
        cut = np.stack([np.asarray(image)[:, 2:18] for image in images])
        pixels = torch.from_numpy(cut).permute(0, 3, 1, 2).float() / 127.5 - 1
        expected = tiny_backbone.encode_images(pixels).unflatten(0, (-1, 2)).half()
        assert torch.equal(pool.read_latents(shard), expected)
        assert pool.has_text(shard.row)


def test_a_lost_shard_is_made_again_and_nothing_else(pool, parquet, tiny_backbone):
    files = {path: path.stat().st_mtime_ns for path in pool.folder.rglob("*") if path.is_file()}
    lost = sorted((pool.folder / "latents").glob("*"))[1]
    before = lost.read_bytes()
    lost.unlink()
    again = imported(pickapic(str(parquet)), tiny_backbone, pool.folder.parent)
    assert again.folder == pool.folder and lost.read_bytes() == before
    assert {path for path, time in files.items() if path.stat().st_mtime_ns != time} == {lost}


def test_a_missing_column_is_named(tmp_path):
    path = write_pickapic(tmp_path / "other.parquet", drop=["label_0"])
    with pytest.raises(
        InputError, match=r"no column 'label_0' \(import.label\); it has jpg_0, jpg_1, caption"
    ):
        pickapic(str(path))


def test_files_that_are_not_there_or_no_table(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        pickapic(str(tmp_path / "nothing.parquet"))
    with pytest.raises(InputError, match="no parquet file in it"):
        pickapic(str(tmp_path))
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    with pytest.raises(InputError, match=r"bad.parquet cannot be read as parquet"):
        pickapic(str(tmp_path))


def test_a_label_that_is_none(tmp_path):
    columns = {"jpg_0": [b"", b""], "jpg_1": [b"", b""], "label_0": [1.0, 0.7], "caption": ["a", "b"]}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(InputError, match=r"row 2: label_0 is 0.7; it must be 1"):
        _ = pickapic(str(tmp_path / "x.parquet")).entries


def test_nothing_left_says_why(tmp_path):
    pq.write_table(
        pa.table(
            {"jpg_0": [b"x"] * 2, "jpg_1": [None] * 2, "label_0": [1.0, 0.5], "caption": ["a", "b"]},
            pa.schema(
                {"jpg_0": pa.binary(), "jpg_1": pa.binary(), "label_0": pa.float64(), "caption": pa.string()}
            ),
        ),
        tmp_path / "x.parquet",
    )
    said = (
        r"left out: 1 ties \(the first: x.parquet row 2\), 1 with a broken image\n"
        r"  x.parquet row 1, jpg_0: .*\n  x.parquet row 1, jpg_1: there is none"
    )
    with pytest.raises(InputError, match=said):
        survey(pickapic(str(tmp_path / "x.parquet")), progress=False)


def test_a_limit_takes_the_first(parquet):
    assert [entry.caption for entry in pickapic(str(parquet), limit=2).entries] == ["a red cat", "a blue dog"]


def test_the_fingerprint_is_that_of_the_content(parquet, tmp_path):
    own = pickapic(str(parquet)).fingerprint
    copy = tmp_path / "elsewhere.parquet"
    copy.write_bytes(parquet.read_bytes())
    assert pickapic(str(copy)).fingerprint == own
    assert pickapic(str(parquet), limit=2).fingerprint != own


@pytest.mark.parametrize("groups", [3, 100])
def test_rows_are_found_in_any_order(tmp_path, groups):
    pq.write_table(pa.table({"n": list(range(100))}), tmp_path / "n.parquet", row_group_size=groups)
    cursor = RowCursor(Table(tmp_path / "n.parquet"), ["n"])
    for row in (0, 1, 50, 99, 40, 41, 0):
        assert cursor.row(row) == {"n": row}
    with pytest.raises(InputError, match="has no row"):
        cursor.row(100)


def test_text_tables_hold_the_same_rows(tmp_path):
    (tmp_path / "a.csv").write_text('caption,score\n"a, red\ncat",1\nb\u2028c,2\n')
    (tmp_path / "a.tsv").write_text('caption\tscore\n"a, red\ncat"\t1\nb\u2028c\t2\n')
    (tmp_path / "a.jsonl").write_text(
        '{"caption": "a, red\\ncat", "score": "1"}\n{"caption": "b\u2028c", "score": "2"}\n'
    )
    (tmp_path / "a.json").write_text(
        '[{"caption": "a, red\\ncat", "score": "1"}, {"caption": "b\u2028c", "score": "2"}]'
    )
    for kind in ("csv", "tsv", "jsonl", "json"):
        rows = [row for _, row in Table(tmp_path / f"a.{kind}").rows(["caption", "score"])]
        assert rows == [{"caption": "a, red\ncat", "score": "1"}, {"caption": "b\u2028c", "score": "2"}], kind


# --- images ---


def test_transparency_is_white_and_exif_turns(tmp_path):
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert np.asarray(picture(encoded(clear), tmp_path, (2, 2))).tolist() == [[[255] * 3] * 2] * 2
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    # 255 * (1 - 128 / 255) = 127
    assert np.asarray(picture(encoded(half), tmp_path, (4, 4)))[0, 0].tolist() == [127] * 3
    turned = Image.fromarray(
        np.array([[[255, 0, 0], [0, 255, 0]]] * 2, dtype=np.uint8)
    )  # red left, green right
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter to the right: what is left comes to the top
    turned.save(tmp_path / "turned.png", exif=exif)
    assert np.asarray(picture("turned.png", tmp_path, (2, 2))).tolist() == [
        [[255, 0, 0]] * 2,
        [[0, 255, 0]] * 2,
    ]


def test_the_middle_is_cut_out_and_scaled(tmp_path):
    wide = colored((0, 0, 0), (40, 10))
    expected = wide.crop((15, 0, 25, 10)).resize((5, 5), Image.Resampling.LANCZOS)
    assert np.array_equal(picture(encoded(wide), tmp_path, (5, 5)), expected)


@pytest.mark.parametrize(
    "cell, reason",
    [
        (None, "there is none"),
        ({"bytes": None, "path": "a.png"}, "there is none"),
        (b"no image", "no image"),
        ("missing.png", "No such file"),
        (3, "a int where"),
    ],
)
def test_an_image_that_is_none(tmp_path, cell, reason):
    with pytest.raises(BrokenImage, match=reason):
        picture(cell, tmp_path, (4, 4))


# --- rankings and folders ---


def test_dense_ranks():
    assert dense_ranks([1, 3, 2, 3], "lower") == (2, 0, 1, 0)
    assert dense_ranks([0.5, 2.5, 0.5], "higher") == (0, 1, 0)


def write_images(folder, count):
    for number in range(count):
        colored((20 * number, 100, 50)).save(folder / f"{number}.png")
    return [f"{number}.png" for number in range(count)]


@pytest.mark.parametrize("way", ["above", "absolute", "link", "linked folder"])
def test_paths_that_lead_out_of_their_folder_are_refused_with_their_row(tmp_path, way):
    own, away = tmp_path / "own", tmp_path / "away"
    for made in (own, away):
        made.mkdir()
        write_images(made, 2)
    (own / "2.png").symlink_to(away / "1.png")
    (own / "there").symlink_to(away)
    (own / "same.png").symlink_to("1.png")
    path = {"above": "../away/0.png", "absolute": str(away / "0.png"), "link": "2.png"}.get(
        way, "there/0.png"
    )
    (own / "metadata.csv").write_text(
        f"file_name,caption\n{own / '0.png'},a\nsame.png,a\n0.png,b\n{path},b\n"
    )
    (tmp_path / "linked").symlink_to(own)  # of a folder that is itself a link, files lie in it
    for name in (own, tmp_path / "linked"):
        for read in (survey, lambda source, *_: source.fingerprint):
            with pytest.raises(InputError) as refused:
                read(folder(str(name)), False)
            told = f"metadata.csv row 4, image 1: {path} leads out of {name}: put the image there, or, if"
            assert str(refused.value).startswith(told) and "import.outside=true" in str(refused.value)
    trusted = folder(str(own), outside=True)
    assert len(survey(trusted, False).ids) == 2 and trusted.fingerprint
    with pytest.raises(InputError, match=r"unread.json row 1, image 2: .* leads out of"):
        (own / "unread.json").write_text(
            json.dumps([{"prompt": "a", "image_path": ["0.png", path], "rank": [1, 2]}])
        )
        survey(rankings(str(own / "unread.json")), False)


def test_rankings_are_thinned_to_the_smallest(tmp_path, tiny_backbone):
    names = write_images(tmp_path, 5)
    rows = [
        {"prompt": "a red cat", "image_path": names[:5], "rank": [2, 5, 1, 4, 3]},
        {"prompt": "a blue dog", "image_path": names[:3], "rank": [1.5, 3, 1.5]},
        {"prompt": "a tie", "image_path": names[:3], "rank": [1, 1, 1]},
        {"prompt": "unequal", "image_path": names[:2], "rank": [1, 2, 3]},
        {"prompt": "lost", "image_path": ["gone.png", *names[:2]], "rank": [1, 2, 3]},
        {"prompt": "one rank", "image_path": names[:2], "rank": [1]},
    ]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    source = rankings(str(tmp_path / "test.json"))
    pool = imported(source, tiny_backbone, tmp_path / "pools")
    table = read_import_table(pool.folder)
    # of five the best (image 2), the worst (image 1) and the middle one (image 4, rank 3); 0 is the worst
    assert table.places[0].tolist() == [[0, 0, 1], [0, 0, 2], [0, 0, 4]]
    assert pool.scores([HUMAN.key], 3)[..., 0].tolist() == [[0, 4, 2], [1, 0, 1]]
    assert table.report["dropped"] == {
        "ties": 1,
        "with more or fewer ranks than images": 2,
        "with a broken image": 1,
    }
    assert table.report["broken"] == [
        "test.json row 5, image 1: [Errno 2] No such file or directory: " + repr(str(tmp_path / "gone.png"))
    ]
    assert [len(entry.places) for entry in rankings(str(tmp_path / "test.json"), candidates=5).entries] == [5]
    # win-rates without doubt, k / (N - 1): the middle one beats one of two; a shared best place beats the
    # loser and half of its equal
    found = TrainingData(pool, [p for p, _ in pool.prompts], 3, [HUMAN], "").select(
        random_pair, "win_rate", 0, False
    )
    assert found.selection.rewards.tolist() == [[0.0, 1.0, 0.5], [0.75, 0.0, 0.75]]


def test_a_ranking_is_the_same_read_from_parquet(tmp_path):
    names = write_images(tmp_path, 3)
    rows = {"prompt": ["a red cat"], "rank": [[2, 3, 1]]}
    pq.write_table(
        pa.table(rows | {"image_path": [[{"bytes": (tmp_path / name).read_bytes()} for name in names]]}),
        tmp_path / "x.parquet",
    )
    (tmp_path / "x.jsonl").write_text(
        json.dumps({"prompt": "a red cat", "rank": [2, 3, 1], "image_path": names})
    )
    embedded, paths = (rankings(str(tmp_path / f"x.{kind}")) for kind in ("parquet", "jsonl"))
    assert embedded.entries == paths.entries
    for item in range(3):
        pictures = [picture(source.cell((0, 0, item)), source.images, (8, 8)) for source in (embedded, paths)]
        assert np.array_equal(*pictures)


def test_the_content_of_image_files_is_in_the_fingerprint(tmp_path):
    names = write_images(tmp_path, 2)
    (tmp_path / "x.jsonl").write_text(
        json.dumps({"prompt": "a red cat", "rank": [2, 1], "image_path": names})
    )
    before = rankings(str(tmp_path / "x.jsonl")).fingerprint
    colored((1, 2, 3)).save(tmp_path / "1.png")
    assert rankings(str(tmp_path / "x.jsonl")).fingerprint != before


def test_a_folder_with_a_table(tmp_path):
    names = write_images(tmp_path, 5)
    captions = ["a red cat", "a blue dog", "a red cat", "a blue dog", "alone"]
    lines = [
        f"{name},{caption},{score}"
        for name, caption, score in zip(names, captions, [1, 7, 9, 2, 3], strict=True)
    ]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,caption,score", *lines]))
    source = folder(str(tmp_path), score="score")
    assert [(entry.caption, entry.places, entry.ranks) for entry in source.entries] == [
        ("a red cat", ((0, 0, 0), (0, 2, 0)), (0, 1)),
        ("a blue dog", ((0, 1, 0), (0, 3, 0)), (1, 0)),
    ]
    assert source.dropped == {"with too few images": 1}
    assert folder(str(tmp_path)).entries[0].ranks is None
    with pytest.raises(InputError, match=r"no other.csv in it; name the table with import.table=FILE"):
        folder(str(tmp_path), table="other.csv")
    for file in (tmp_path / "nofolder", tmp_path / "images.tar"):
        (tmp_path / "images.tar").touch()
        with pytest.raises(InputError, match=rf"import.files={file} is no folder: give the one that holds"):
            folder(str(file))


# --- training ---


@pytest.fixture(scope="module")
def imported_folder(parquet, tiny_run):
    """As `generate.py stage=import` makes it; the caption "red cat" is a validation prompt of the runs."""
    cfg = tiny_run(
        "unused",
        "stage=import",
        "import=pickapic",
        f"import.files={parquet}",
        "sampling.batch=4",
        config="generate",
    )
    generate_script.run(cfg)
    return next((tiny_run.folder / "pools").glob("tiny-*-imported"))


@pytest.mark.parametrize("labels", ["human", "rewards"])
def test_training_on_an_imported_pool(tiny_run, imported_folder, labels):
    name = f"imported-{labels}"
    cfg = tiny_run(
        name, f"pool.imported={imported_folder}", f"pool.labels={labels}", "objective=dpo", "evaluate=false"
    )
    assert 0 <= train_script.run(cfg) <= 1
    assert not list((tiny_run.folder / "pools").glob("tiny-*-train")), (
        "the base's own candidates are not sampled"
    )
    card = (tiny_run.folder / name / "policy" / "README.md").read_text()
    order = "ordered by human choice" if labels == "human" else "scored by g, r"
    assert f"5 imported entries of 2 images ({imported_folder.name}), {order}; 1 left out" in card


def test_one_human_choice_has_dr_one_and_capo_is_ipo(pool):
    prompts = [prompt for prompt, _ in pool.prompts]
    for calibration in ("win_rate", "raw"):
        found = TrainingData(pool, prompts, 2, [HUMAN], "").select(frs, calibration, 0, False)
        batch = collate([found.dataset[row, 0] for row in range(len(prompts))])
        gap = batch.calibrated_rewards[:, 0] - batch.calibrated_rewards[:, 1]
        assert gap.tolist() == [1.0] * len(prompts)
    generator = torch.Generator().manual_seed(0)
    errors = PairErrors(*torch.rand(5, len(prompts), generator=generator), gap)
    assert torch.equal(capo(errors, beta=300.0), ipo(errors, beta=300.0))
    assert (
        found.spreads[0].saturated != found.spreads[0].saturated
    )  # NaN: nobody is warned of a choice that is certain


def test_a_pool_that_cannot_be_trained_on(tiny_run, imported_folder, tmp_path, parquet):
    with pytest.raises(InputError, match=rf"pool.imported={tmp_path}: it is no imported pool; give the fol"):
        train_script.run(tiny_run("bad", f"pool.imported={tmp_path}", "evaluate=false"))
    with pytest.raises(InputError, match=rf"no imported pool; there are .*{imported_folder}.*: give one"):
        train_script.run(tiny_run("bad", f"pool.imported={imported_folder.parent}", "evaluate=false"))
    generate_script.run(tiny_run("unused", "stage=text", config="generate"))
    sampled = next((tiny_run.folder / "pools").glob("tiny-*-train"))
    with pytest.raises(InputError, match="it is no imported pool"):
        train_script.run(tiny_run("bad", f"pool.imported={sampled}", "evaluate=false"))
    with pytest.raises(InputError, match=r"pool.labels=people: must be one of human, rewards"):
        train_script.run(
            tiny_run("bad", f"pool.imported={imported_folder}", "pool.labels=people", "evaluate=false")
        )
    (imported_folder / "latents" / "00000-00.safetensors").rename(tmp_path / "kept")
    try:
        with pytest.raises(InputError, match=r"incomplete \(1 shards.* trainer.precision of this run"):
            given = f"pool.imported={imported_folder}", f"pool.root={tmp_path / 'pools'}", "evaluate=false"
            train_script.run(tiny_run("bad", *given))
    finally:
        (tmp_path / "kept").rename(imported_folder / "latents" / "00000-00.safetensors")
    assert not list(tmp_path.rglob("*.safetensors"))  # refused before an image was drawn


def test_another_models_latents_are_refused(pool, tiny_backbone, tiny_run):
    other = Pool(pool.folder, pool.manifest.__class__(**{**vars(pool.manifest), "latent_space": "0" * 64}))
    found = Imported(other, read_import_table(pool.folder), [prompt for prompt, _ in pool.prompts], 0)
    with pytest.raises(InputError, match="its latent_space are not those of tiny"):
        found.ready(tiny_backbone, SETTINGS, [HUMAN], LocalEngine())


def test_what_to_import_must_be_said(tiny_run):
    with pytest.raises(InputError, match="import=pickapic, import=rankings or import=folder"):
        generate_script.run(tiny_run("unused", "stage=import", config="generate"))
    with pytest.raises(InputError, match=r"import.files is not given"):
        generate_script.run(tiny_run("unused", "stage=import", "import=folder", config="generate"))
    cfg = tiny_run("unused", "stage=import", "import=pickapic", "import.files=x.parquet", config="generate")
    OmegaConf.update(cfg, "import.labels", "x", force_add=True)
    with pytest.raises(
        InputError,
        match=r"import.labels=x: capo.data.importing.pickapic takes no such argument; did you mean "
        r"import.label?",
    ):
        generate_script.run(cfg)


@pytest.mark.parametrize("source", ["rankings", "folder"])
def test_the_command_line_imports_every_kind(typed, tmp_path, source, capsys):
    names = write_images(tmp_path, 4)
    rows = [
        {"prompt": "a red cat", "image_path": names[:2], "rank": [1, 2]},
        {"prompt": "a blue dog", "image_path": names[2:], "rank": [2, 1]},
    ]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    lines = [f"{name},{'a red cat' if number < 2 else 'a blue dog'}" for number, name in enumerate(names)]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,caption", *lines]))
    place = tmp_path / "test.json" if source == "rankings" else tmp_path
    typed(
        "generate",
        "stage=import",
        f"import={source}",
        f"import.files={place}",
        f"pool.root={tmp_path / 'pools'}",
        f"hydra.run.dir={tmp_path / 'run'}",
    )
    said = capsys.readouterr().out
    assert "2 entries with 2 different captions; left out: none" in said
    pool = Pool.open(next((tmp_path / "pools").iterdir()))
    # what trains on the pool: with the model and all else that was given, but for the import's own
    labels = "objective=dpo" if source == "rankings" else "pool.labels=rewards"
    assert f"python train.py pool.imported={pool.folder} {labels} rewards=fake " in said
    assert f"pool.root={tmp_path / 'pools'}" in said and "import.files" not in said and "stage=" not in said
    assert read_import_table(pool.folder).candidates == 2 and all(
        pool.has_latents(shard) for shard in pool.shards(2)
    )
    if source == "folder":  # nobody has chosen
        with pytest.raises(InputError, match=r"pool.labels=human: .* has no human choices"):
            Imported.open(pool.folder, "human", [])
        assert len(Imported.open(pool.folder, "rewards", []).prompts) == 2


def test_a_caption_that_no_text_encoder_reads_to_its_end_is_refused():
    assert caption_of("a" * 100_000, "t.csv row 3: caption") == "a" * 100_000
    with pytest.raises(
        InputError, match=r"t.csv row 3: caption has 100,001 letters, a prompt at most 100,000"
    ):
        caption_of("a" * 100_001, "t.csv row 3: caption")


@pytest.mark.parametrize(("name", "text", "message"), [
    ("t.csv", 'caption,score\n"a,1\nb,2\n', r"t.csv cannot be read as csv \(unexpected end of data\)"),
    ("t.csv", "rating,rating\n1,2\n", r"t.csv cannot be read as csv \(several columns are called rating\)"),
    ("t.tsv", "rating\trating\n1\t2\n", "several columns are called rating"),
    ("t.csv", "a,b\n1,2\n3\n", "row 2 has fewer cells than there are columns"),
    ("t.csv", "a,b\n1,2,3\n", "row 1 has more cells than there are columns"),
    ("t.csv", "a;b\n1;2\n", "its first line has ';' between columns, not ','"),
    ("t.tsv", "a,b\n1,2\n", "its first line has ',' between columns"),
])  # fmt: skip
def test_tables_that_would_lose_something_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        Table(tmp_path / name)


def test_a_parquet_table_with_two_columns_of_one_name_is_refused(tmp_path):
    pq.write_table(pa.table([["a"], ["b"]], names=["caption", "caption"]), tmp_path / "t.parquet")
    with pytest.raises(InputError, match=r"as parquet \(several columns are called caption\)"):
        Table(tmp_path / "t.parquet")


@pytest.mark.parametrize(("option", "other", "column"), [
    ("image_1", "image_0", "jpg_0"),
    ("label", "caption", "caption"),
])  # fmt: skip
def test_a_column_has_one_meaning(parquet, option, other, column):
    with pytest.raises(InputError, match=f"import.{option}={column}: it is import.{other} too"):
        pickapic(str(parquet), **{option: column})


def test_a_table_that_is_named_twice_is_refused(parquet):
    with pytest.raises(InputError, match=r"import.files: .*pairs.parquet is named twice"):
        pickapic([str(parquet), str(parquet.parent / ".." / parquet.parent.name / parquet.name)])


def test_a_name_that_no_file_system_takes_is_one_broken_image(tmp_path):
    names = [*write_images(tmp_path, 2), "a" * 400]
    rows = [f"{name},{'b' if len(name) > 9 else 'a'}" for name in (*names, "0.png")]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,caption", *rows, "1.png,b"]) + "\n")
    source = folder(str(tmp_path), candidates=2)
    assert source.fingerprint
    found = survey(source, False)
    assert found.texts == ["a"] and "File name too long" in found.report["broken"][0]


@pytest.mark.parametrize("value", [True, "1_0", "inf", float("-inf"), "1e999"])
def test_scores_that_are_no_finite_numbers_are_refused(value):
    with pytest.raises(
        InputError, match=r"t.csv row 3: score is .*, which is not a finite number; correct it"
    ):
        number_of(value, "t.csv row 3: score")


def test_between_an_image_and_itself_there_is_no_choice(tmp_path):
    write_images(tmp_path, 2)
    rows = ["a,0.png,./0.png,1", "b,0.png,1.png,0"]
    (tmp_path / "t.csv").write_text("\n".join(["caption,jpg_0,jpg_1,label_0", *rows]))
    found = survey(pickapic(str(tmp_path / "t.csv")), False)
    assert found.texts == ["b"]
    assert "left out: 1 with one image twice (the first: t.csv row 1)" in described(found.report)
    same = encoded(colored((1, 2, 3)))
    columns = {"jpg_0": [same], "jpg_1": [same], "label_0": [1.0], "caption": ["a"]}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(InputError, match=r"nothing to import: .*1 with one image twice"):
        survey(pickapic(str(tmp_path / "x.parquet")), False)

"""Selected pairs as a parquet file that other trainers read, and that this one imports again."""

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hydra.utils import instantiate
from PIL import Image

from capo.cli import generate as generate_script
from capo.cli.build import build_components, training_data
from capo.data.importing import pickapic
from capo.data.pair_export import check_target, encoded
from capo.errors import InputError
from capo.runtime.files import whole_file

datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def exported(tiny_run):
    """Nine training prompts with six candidates; one pair of each that has one."""
    prompts = [
        f"a {color} {shape}\n"
        for color in ("red", "blue", "green")
        for shape in ("circle", "square", "triangle")
    ]
    (tiny_run.folder / "train.txt").write_text("".join(prompts))
    generate_script.run(tiny_run("unused", "pool.candidates=6", config="generate"))

    def export(name, *overrides):
        cfg = tiny_run(
            name,
            "stage=export",
            "pool.candidates=6",
            f"pair_export.file={tiny_run.folder / name}.parquet",
            "pair_export.images=png",
            "pair_export.row_group=4",
            *overrides,
            config="generate",
        )
        generate_script.run(cfg)
        return tiny_run.folder / f"{name}.parquet"

    return export


@pytest.fixture(scope="module")
def pairs(exported):
    return exported("pairs")


def test_only_an_export_is_replaced(pairs, tmp_path):
    check_target(pairs, "pair_export.file")
    check_target(tmp_path / "none", "pair_export.file")
    (tmp_path / "empty").touch()
    check_target(tmp_path / "empty", "pair_export.file")
    pq.write_table(pq.read_table(pairs).replace_schema_metadata({}), tmp_path / "other.parquet")
    (tmp_path / "notes").write_text("mine")
    for name in ("other.parquet", "notes"):
        with pytest.raises(InputError, match=rf"pair_export.file={tmp_path}/{name} is a file that no export"):
            check_target(tmp_path / name, "pair_export.file")
    with pytest.raises(InputError, match=rf"are written as Parquet; give {tmp_path}/pairs.parquet"):
        check_target(tmp_path / "pairs.csv", "pair_export.file")
    check_target(tmp_path / "sd1.5-pairs", "pair_export.file")  # a version, and no format


def test_other_trainers_can_load_it(pairs, tmp_path):
    loaded = datasets.load_dataset("parquet", data_files=str(pairs), cache_dir=str(tmp_path), split="train")
    rows = list(loaded)
    assert {"jpg_0", "jpg_1", "label_0", "caption", "dR", "scores_0", "scores_1"} <= set(loaded.column_names)
    assert len(rows) >= 6
    assert abs(sum(row["label_0"] for row in rows) - len(rows) / 2) <= 0.5  # balanced
    for row in rows:
        assert {row["label_0"], row["label_1"]} == {0.0, 1.0}
        assert row["dR"] > 0
        assert (
            Image.open(io.BytesIO(row["jpg_0"])).size == Image.open(io.BytesIO(row["jpg_1"])).size == (16, 16)
        )


def test_the_winner_is_the_better_image(pairs):
    """The rewards r and g are the mean brightness of a channel, scaled by 1 / 25.5.

    Computed here from the exported pixels.
    """
    for row in pq.read_table(pairs).to_pylist():
        for side in (0, 1):
            mean = np.asarray(Image.open(io.BytesIO(row[f"jpg_{side}"]))).reshape(-1, 3).mean(0) / 25.5
            assert row[f"scores_{side}"] == pytest.approx({"r": mean[0], "g": mean[1]}, rel=1e-5)
        winner, loser = (0, 1) if row["label_0"] == 1 else (1, 0)
        won, lost = row[f"scores_{winner}"], row[f"scores_{loser}"]
        # frs: the winner is not dominated, and so not by this loser
        assert won["r"] > lost["r"] or won["g"] > lost["g"]


def test_they_are_the_pairs_of_trainings_first_visit(pairs, tiny_run):
    cfg = tiny_run("unused", "pool.candidates=6")
    components = build_components(cfg)
    found = training_data(cfg, components).select(instantiate(cfg.pairs), cfg.calibration, cfg.seed, False)
    rows = {row["prompt_id"]: row for row in pq.read_table(pairs).to_pylist()}
    usable = found.selection.usable.nonzero().flatten().tolist()
    assert len(rows) == len(usable)
    for number in usable:
        item = found.dataset[number, 0]
        row = rows[item["prompt_id"]]
        winner, loser = (
            ("candidate_0", "candidate_1") if row["label_0"] == 1 else ("candidate_1", "candidate_0")
        )
        latents = found.dataset.reader.latents(
            found.dataset.positions[number], [row[winner], row[loser]]
        ).float()
        assert torch.equal(latents, item["latents"])
        assert row["dR"] == (item["calibrated_rewards"][0] - item["calibrated_rewards"][1]).item()


def test_row_groups_are_bounded_and_the_same_seed_gives_the_same_bytes(pairs, exported):
    file = pq.ParquetFile(pairs)
    assert file.num_row_groups > 1
    assert max(file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)) == 4
    assert exported("again").read_bytes() == pairs.read_bytes()
    assert exported("other", "seed=1").read_bytes() != pairs.read_bytes()


def test_every_pair_there_is(exported, pairs, tiny_run):
    every = pq.read_table(exported("every", "pair_export.per_prompt=null")).to_pylist()
    keys = {(row["prompt_id"], *sorted([row["candidate_0"], row["candidate_1"]])) for row in every}
    assert len(keys) == len(every)
    assert {
        (row["prompt_id"], *sorted([row["candidate_0"], row["candidate_1"]]))
        for row in pq.read_table(pairs).to_pylist()
    } <= keys
    cfg = tiny_run("unused", "pool.candidates=6")
    found = training_data(cfg, build_components(cfg))
    selection = found.select(instantiate(cfg.pairs), cfg.calibration, cfg.seed, False).selection
    assert len(every) == int(selection.pairs.sum())


def test_what_was_exported_imports_as_the_same_pairs(pairs, tiny_run):
    rows = pq.read_table(pairs).to_pylist()
    entries = pickapic(str(pairs)).entries
    assert [entry.caption for entry in entries] == [row["caption"] for row in rows]
    assert [entry.ranks for entry in entries] == [(1, 0) if row["label_0"] == 1 else (0, 1) for row in rows]
    generate_script.run(
        tiny_run("unused", "stage=import", "import=pickapic", f"import.files={pairs}", config="generate")
    )
    folder = next((tiny_run.folder / "pools").glob("tiny-*-imported"))
    again = tiny_run.folder / "again-imported.parquet"
    cfg = tiny_run(
        "unused", "stage=export", f"pool.imported={folder}", f"pair_export.file={again}", config="generate"
    )
    generate_script.run(cfg)
    back = {row["caption"]: row for row in pq.read_table(again).to_pylist()}
    assert len(back) == len(rows)
    for row in rows:
        winner = 0 if row["label_0"] == 1 else 1
        own = back[row["caption"]]
        assert own["dR"] == 1.0 and own[f"candidate_{0 if own['label_0'] == 1 else 1}"] == winner


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x" / "pairs.parquet"
    with pytest.raises(RuntimeError), whole_file(path) as unfinished:
        unfinished.write_bytes(b"half")
        raise RuntimeError
    assert list(path.parent.iterdir()) == []
    with whole_file(path) as unfinished:
        unfinished.write_bytes(b"whole")
    assert path.read_bytes() == b"whole" and [file.name for file in path.parent.iterdir()] == [
        "pairs.parquet"
    ]
    (tmp_path / "file").write_bytes(b"")
    with (
        pytest.raises(InputError, match="cannot be written"),
        whole_file(tmp_path / "file" / "pairs.parquet"),
    ):
        pass


def test_jpeg_is_near_and_png_exact():
    image = Image.fromarray(np.full((16, 16, 3), (200, 30, 90), dtype=np.uint8))
    assert np.array_equal(Image.open(io.BytesIO(encoded(image, "png"))), image)
    jpeg = Image.open(io.BytesIO(encoded(image, "jpeg")))
    assert jpeg.format == "JPEG"
    assert np.abs(np.asarray(jpeg, dtype=int) - np.asarray(image, dtype=int)).max() <= 3

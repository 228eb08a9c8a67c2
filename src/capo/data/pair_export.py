"""Export of selected pairs to a parquet file with the columns of Pick-a-Pic, for other trainers."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL.Image import Image
from tqdm import tqdm

from capo.backbones import Backbone
from capo.data.candidates import Candidates
from capo.data.dataset import PairDataset, visit_generator
from capo.data.selection import pair_matrix
from capo.errors import InputError
from capo.runtime.files import REMEDY, check_ordinary, whole_file

MARK = b"capo"  # in the metadata of an export
FORMATS = {"jpeg": {"format": "JPEG", "quality": 95, "subsampling": 0}, "png": {"format": "PNG"}}


# endings of files that a reader would take for another format
OTHER_FORMATS = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".arrow", ".zip", ".tar")


@dataclass(frozen=True)
class Pair:
    """Pair of candidates in row `row` of a selection; `side` is the winner's side in the file, 0 or 1."""

    row: int
    winner: int
    loser: int
    side: int

    @property
    def candidates(self) -> tuple[int, int]:
        """Candidates on side 0 and on side 1."""
        return (self.winner, self.loser) if self.side == 0 else (self.loser, self.winner)


def selected_pairs(dataset: PairDataset, per_prompt: int | None = 1) -> list[Pair]:
    """Distinct pairs that training draws in the first `per_prompt` visits of each prompt; None: all pairs.

    The winner is on side 0 in half of the pairs (one more if their number is odd); the dataset's seed
    determines in which.
    """
    rows = dataset.selection.usable.nonzero().flatten().tolist()
    found = [(row, *pair) for row in rows for pair in _pairs_of(dataset, row, per_prompt)]
    sides = np.random.Generator(np.random.Philox(key=[dataset.seed % 2**64, len(found)])).permutation(
        np.arange(len(found)) % 2
    )
    return [Pair(*pair, side) for pair, side in zip(found, sides.tolist(), strict=True)]


def _pairs_of(dataset: PairDataset, row: int, per_prompt: int | None) -> list[tuple[int, int]]:
    selection = dataset.selection
    if per_prompt is None:
        matrix = pair_matrix(selection.winners[row], selection.losers[row], selection.rewards[row])
        return [tuple(pair) for pair in matrix.nonzero().tolist()]
    draws = (visit_generator(dataset.seed, dataset.prompts[row].id, visit) for visit in range(per_prompt))
    return list(dict.fromkeys(selection.draw(row, draw.integers) for draw in draws))


def export_pairs(
    candidates: Candidates,
    backbone: Backbone,
    path: str | Path,
    *,
    per_prompt: int | None = 1,
    image_format: str = "jpeg",
    row_group: int = 64,
    batch: int = 8,
    settings: dict | None = None,
    progress: bool = True,
) -> int:
    """Decode the images of the selected pairs and write them to a parquet file.

    Columns: jpg_0 and jpg_1 (encoded images), label_0 and label_1 (1.0 for the winner, else 0.0), caption,
    dR, scores_0 and scores_1 (raw scores by reward), prompt_id, candidate_0, candidate_1.

    Args:
        candidates: result of `TrainingData.select`.
        backbone: backbone whose VAE decodes the latents.
        path: file to write.
        per_prompt: see `selected_pairs`.
        image_format: a key of FORMATS.
        row_group: pairs in a row group; that many pairs are held in memory at a time.
        batch: images decoded at a time.
        settings: JSON values for the file's metadata.
        progress: whether to show a progress bar.

    Returns:
        The number of pairs.

    Raises:
        InputError: if the path is not writable, or the disk has too little space for all pairs, as estimated
            from the first row group.
    """
    pairs = selected_pairs(candidates.dataset, per_prompt)
    with (
        whole_file(Path(path)) as unfinished,
        pq.ParquetWriter(unfinished, _schema(candidates.labels, settings)) as writer,
    ):
        for start in tqdm(
            range(0, len(pairs), row_group), desc="pairs", disable=not progress, dynamic_ncols=True
        ):
            group = pairs[start : start + row_group]
            writer.write_table(
                _table(group, candidates, backbone, image_format, batch, writer.schema),
                row_group_size=row_group,
            )
            if start == 0:
                _check_room(unfinished, len(group), len(pairs) - len(group))
    return len(pairs)


def check_target(path: Path, key: str) -> None:
    """Raise InputError if something other than an export stands at `path`, the value of `key`.

    Raises it for the ending of another format, too; other dots may be those of a version.
    """
    check_ordinary(path, key)
    if path.suffix.lower() in OTHER_FORMATS:
        raise InputError(f"{key}={path}: pairs are written as Parquet; give {path.with_suffix('.parquet')}")
    if path.exists() and path.stat().st_size and not _is_export(path):
        raise InputError(
            f"{key}={path} is a file that no export of pairs wrote, and is not replaced: move it away, or "
            "give another name"
        )


def _is_export(path: Path) -> bool:
    try:
        return MARK in (pq.read_schema(path).metadata or {})
    except Exception:  # what pyarrow raises for other files has no base class of its own
        return False


def _schema(rewards: Sequence[str], settings: dict | None) -> pa.Schema:
    scores = pa.struct([(name, pa.float32()) for name in rewards])
    return pa.schema(
        {
            "jpg_0": pa.binary(),
            "jpg_1": pa.binary(),
            "label_0": pa.float64(),
            "label_1": pa.float64(),
            "caption": pa.string(),
            "dR": pa.float64(),
            "scores_0": scores,
            "scores_1": scores,
            "prompt_id": pa.string(),
            "candidate_0": pa.int32(),
            "candidate_1": pa.int32(),
        },
        metadata={MARK: json.dumps(settings or {}, sort_keys=True)},
    )


def _table(
    group: Sequence[Pair],
    candidates: Candidates,
    backbone: Backbone,
    image_format: str,
    batch: int,
    schema: pa.Schema,
) -> pa.Table:
    dataset, gains = candidates.dataset, candidates.selection.rewards
    # concatenated, so that images are decoded in full batches across pairs
    latents = torch.cat(
        [dataset.reader.latents(dataset.positions[pair.row], pair.candidates) for pair in group]
    )
    images = [encoded(image, image_format) for image in backbone.decode(latents, batch)]
    rows = [
        {
            "jpg_0": images[2 * number],
            "jpg_1": images[2 * number + 1],
            "label_0": 1.0 - pair.side,
            "label_1": float(pair.side),
            "caption": dataset.prompts[pair.row].text,
            "prompt_id": dataset.prompts[pair.row].id,
            "dR": (gains[pair.row, pair.winner] - gains[pair.row, pair.loser]).item(),
            **{
                f"scores_{side}": dict(
                    zip(candidates.labels, candidates.scores[pair.row, candidate].tolist(), strict=True)
                )
                for side, candidate in enumerate(pair.candidates)
            },
            **{f"candidate_{side}": candidate for side, candidate in enumerate(pair.candidates)},
        }
        for number, pair in enumerate(group)
    ]
    return pa.Table.from_pylist(rows, schema)


def encoded(image: Image, image_format: str) -> bytes:
    """Bytes of an image file in the format `image_format`, a key of FORMATS."""
    buffer = io.BytesIO()
    image.save(buffer, **FORMATS[image_format])
    return buffer.getvalue()


def _check_room(unfinished: Path, written: int, left: int) -> None:
    """Raise InputError if `left` more pairs do not fit on the disk, at the mean size of those `written`."""
    needed = unfinished.stat().st_size * left / written
    if needed > (free := shutil.disk_usage(unfinished.parent).free):
        raise InputError(
            f"{left} more pairs need about {needed / 2**20:,.1f} MiB, {free / 2**20:,.1f} MiB are free: "
            f"{REMEDY}"
        )

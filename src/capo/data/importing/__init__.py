"""Preference data from elsewhere: images that lie there already, and who was preferred, become a pool.

    tables.py    tables read a few rows at a time: parquet, CSV, TSV, JSON, JSON lines
    images.py    a cell of a table -> a picture of the model's size
    sources.py   what stands in which columns: `pickapic`, `rankings`, `folder` (Hydra group `import`)
    ordering.py  who was preferred: cells -> ranks, entries of one size
    survey.py    which of a source's entries can be used, and why others cannot
    filling.py   text, latents and choices into the pool, shard by shard
    chosen.py    an imported pool as training sees it

An *entry* is a prompt of the pool with its candidates: one comparison or ranking of the source. A caption that stands in many
rows gives as many entries, since a pool has the same number of candidates for every prompt; see `entry_id`.
"""

from capo.data.importing.sources import folder, pickapic, rankings

__all__ = ["folder", "pickapic", "rankings"]

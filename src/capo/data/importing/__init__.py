"""Import of preference data: existing images, with or without human choices, become a pool.

    tables.py    tables, read a few rows at a time: parquet, CSV, TSV, JSON, JSON lines
    images.py    cell of a table -> image of the model's size
    sources.py   meaning of the columns: `pickapic`, `rankings`, `folder` (Hydra group `import`)
    ordering.py  human choices: cells -> ranks, entries with equal numbers of images
    survey.py    which entries of a source can be used, and why others cannot
    filling.py   text, latents and choices into the pool, shard by shard
    chosen.py    imported pool as training data

An *entry* is a prompt of the pool with its candidates: one comparison or ranking of the source. Every
comparison with the same caption gives its own entry, since all prompts of a pool have the same number of
candidates; `entry_id` makes their ids unique.
"""

from capo.data.importing.sources import folder, pickapic, rankings

__all__ = ["folder", "pickapic", "rankings"]

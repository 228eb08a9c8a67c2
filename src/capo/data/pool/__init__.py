"""Candidate pools: the only package that knows how candidates lie on disk.

    POOL/manifest.json                           `Manifest`: created once, never rewritten
    POOL/prompts.parquet                         prompt_id, prompt, split, position; replaced whole on append
    POOL/text/00000.safetensors                  what the denoiser needs of each prompt of the row; a tensor
                                                 that is the same for all stands there once, with a leading 1
    POOL/latents/00000-00.safetensors            `latents` (prompts, candidates, C, H, W) float16, scaled as
                                                 the denoiser sees them
    POOL/scores/<reward>-<fp8>/00000-00.parquet  prompt_id, candidate, score: raw, in the order of the latents
    POOL/imported.parquet                        of an imported pool alone: where its images come from, who was
                                                 preferred
    POOL/.locks/                                 empty but for the locks of processes that are writing

A *row* is a range of prompts: position // prompts_per_shard is its number, the first of a file's two. A
*shard* is a row's block of up to 8 candidates. Appended prompts begin a new row, so positions may have gaps;
added candidates begin a new block, whose first candidate stands in its header. A file is written once, whole,
and rewritten only when it is damaged.
"""

from capo.data.pool.files import DamagedShard
from capo.data.pool.layout import BLOCK, SCHEMA, Manifest, Shard, pool_name
from capo.data.pool.reader import PoolReader
from capo.data.pool.store import Pool

__all__ = ["BLOCK", "SCHEMA", "DamagedShard", "Manifest", "Pool", "PoolReader", "Shard", "pool_name"]

"""Candidate pools; this is the only package that knows their files.

    POOL/manifest.json                           `Manifest`, created once, never rewritten
    POOL/prompts.parquet                         prompt_id, prompt, split, position, with a checksum of the
                                                 file; replaced on append
    POOL/text/00000.safetensors                  text inputs of the denoiser for each prompt of a row; a
                                                 tensor that is equal for all prompts is stored once, with
                                                 leading dimension 1
    POOL/latents/00000-00.safetensors            `latents` (prompts, candidates, C, H, W) float16, scaled as
                                                 the denoiser expects them
    POOL/scores/<reward>-<fp8>/00000-00.parquet  prompt_id, candidate, score: raw, in the order of the latents
    POOL/imported.parquet                        in imported pools only: origin of the images and the choices
                                                 of people
    POOL/reference/<fp16>.bin                    errors of the reference that runs keep for later ones
                                                 (`capo.data.reference_errors`); may be removed at any time
    POOL/.verified/HOST                          files that were read whole on a machine, for their checksums
    POOL/.locks/                                 locks of processes that are writing, else empty

A *row* is a range of prompts; its number, position // prompts_per_shard, is the first number in a file's
name. A *shard* is a block of up to 8 candidates of a row; the block is the second number. Appended prompts
begin a new row, so positions may have gaps. Added candidates begin a new block, whose header has the range of
its candidates. A file is written once and atomically. A damaged shard is made again; a damaged manifest or
table of prompts is refused, since positions cannot be made again.
"""

from capo.data.pool.headers import DamagedShard
from capo.data.pool.layout import BLOCK, Shard, pool_name
from capo.data.pool.manifest import SCHEMA, Manifest, holds_pool, is_begun
from capo.data.pool.reader import PoolReader
from capo.data.pool.store import Pool

__all__ = [
    "BLOCK",
    "SCHEMA",
    "DamagedShard",
    "Manifest",
    "Pool",
    "PoolReader",
    "Shard",
    "holds_pool",
    "is_begun",
    "pool_name",
]

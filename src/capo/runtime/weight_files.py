"""Which files hold the weights of a component's folder."""

import re
from pathlib import Path

from capo.errors import DamagedFile
from capo.runtime.reading import FOLDER_REMEDY, read_json

# Shards are called `NAME.fp16-00001-of-00002.safetensors`; the older form has the variant last.
WEIGHT_NAME = re.compile(
    r"(?P<stem>[^.]+?)(\.(?P<variant>[^.-]+))?"
    r"(?P<shard>-\d{5}-of-\d{5})?(\.(?P<old_variant>[^.]+))?\.safetensors"
)


def weight_files(folder: Path, variant: str | None = None) -> dict[str, Path]:
    """List the safetensors of a component folder that loading reads: those of `variant`, else the plain ones.

    Keys are file names without the variant, so that the same content has the same name in every variant.
    """
    found: dict[str | None, dict[str, Path]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        if match := WEIGHT_NAME.fullmatch(path.name):
            name = match["stem"] + (match["shard"] or "")
            found.setdefault(match["variant"] or match["old_variant"], {})[name] = path
    return found.get(variant) or found.get(None, {})


def weight_map(path: Path) -> dict[str, str]:
    """Read {tensor: file} of an index of weights in several files. Raises DamagedFile."""
    files = read_json(path, FOLDER_REMEDY).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise DamagedFile(path, "weight_map must map names of tensors to names of files", FOLDER_REMEDY)
    return files

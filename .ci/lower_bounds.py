"""Print the lower bounds of pyproject.toml, extras included, as pip's constraints."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = project["optional-dependencies"].values()
lines = [*project["dependencies"], *(line for extra in extras for line in extra)]
found = (re.match(r"([\w-]+)(?:\[.+\])?>=([\d.]+)", line) for line in lines)  # a constraint has no extras
print("\n".join(sorted({f"{each[1]}=={each[2]}" for each in found if each})))

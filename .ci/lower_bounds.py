"""Print the lower bounds of pyproject.toml, extras included, as pip's constraints."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = project["optional-dependencies"].values()
bounds = {re.sub(r">=([\d.]+).*", r"==\1", line) for lines in (project["dependencies"], *extras) for line in lines if ">=" in line}
print("\n".join(sorted(bounds)))

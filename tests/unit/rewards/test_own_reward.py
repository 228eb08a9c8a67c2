import re

import pytest
import yaml
from PIL import Image

from capo.rewards import load_rewards
from fixtures import ROOT

GUIDE = ROOT / "docs" / "rewards.md"


def block(language):
    return re.search(rf"```{language}\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)[1]


def test_the_guides_example_of_ones_own_reward_runs(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(block("python"), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    (reward,) = load_rewards(yaml.safe_load(block("yaml")))
    reward.setup("cpu")
    images = [Image.new("RGB", (9, 5), (gray,) * 3) for gray in (51, 255, 0)]
    assert reward.score(images, ["a", "b", "c"]).tolist() == pytest.approx([51 / 255, 1, 0])
    assert (reward.name, reward.range, reward.needs_prompt) == ("brightness", [0, 1], False)


def test_the_guides_table_agrees_with_the_yaml():
    lines = [line for line in GUIDE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    rows = [
        [cell.strip().removesuffix(" (assumed)") for cell in line.strip("|").split("|")] for line in lines
    ]
    rows = [row for row in rows if len(row) == 9]  # the sets' table has fewer
    assert len(rows) >= 13
    for name, _, _, link, scale, license, *_ in rows:
        name = name.strip("`")
        file = GUIDE.parents[1] / "conf" / "rewards" / f"{name}.yaml"
        (entry,) = yaml.safe_load(file.read_text(encoding="utf-8")).values()
        assert entry["scorer"], f"{name} is listed and has no scorer"
        assert (entry["link"], float(entry["scale"])) == (link, float(scale))
        assert license.split(" ")[0] == entry["license"].split(" ")[0]

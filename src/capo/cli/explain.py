"""Say what keys of the configuration mean: their type, range and default, from the schema.

python -m capo.cli.explain trainer.micro_batch
python -m capo.cli.explain sampling.steps model=sdxl
python -m capo.cli.explain rewards.mps.scale rewards=mps
python -m capo.cli.explain --page > docs/configuration.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from capo.cli.compose import REPOSITORY, composed
from capo.cli.messages import refused
from capo.cli.other_files import command_of
from capo.cli.schema.border import refuse
from capo.cli.schema.scripts import SCRIPTS
from capo.cli.values import resolved
from capo.errors import InputError, alike
from capo.runtime.schema import Node, faults, shown, walked, words
from capo.runtime.schema.tree import GROUP, is_section, picked

ANY = "NAME"  # stands for a name that the user chooses
HEAD = """# Configuration

Every key, its type and range, what `python train.py` composes for it on the shapes world, and its meaning.
A model's file sets other values: `python -m capo.cli.explain sampling.steps model=sdxl` prints one key with
the choices of a command.
`NAME` stands for a name that you choose, such as that of a reward.
Keys of a group are set by its files: `objective=capo` takes `conf/objective/capo.yaml`.
An unknown key, a value of another type and an absent key are refused before anything is loaded.

This page is made by `python -m capo.cli.explain --page > docs/configuration.md`.
"""


def keys_of(script: str) -> dict[str, Node]:
    """Every key of a script's configuration, with `NAME` for names that the user chooses."""
    return dict(walked(SCRIPTS[script]))


def all_keys() -> dict[str, tuple[str, Node]]:
    """Key -> the first script that has it, and its place in the schema."""
    return {
        key: (script, node) for script in reversed(SCRIPTS) for key, node in keys_of(script).items()
    }  # train is the first script and so the last written


def found(key: str) -> tuple[str, str, Node] | None:
    """Script, key of the schema and node for a key as a user writes it; None if there is none."""
    known = all_keys()
    parts = key.split(".")
    for name, (script, node) in known.items():
        pattern = name.split(".")
        if len(pattern) == len(parts) and all(
            want in (ANY, got) for want, got in zip(pattern, parts, strict=True)
        ):
            return script, name, node
    return None


def explained(key: str, cfg: Mapping[str, DictConfig]) -> str:
    """Explain one key; InputError, with what was probably meant, for a key that there is not.

    `cfg` holds the composed configuration by script.
    """
    place = found(key)
    if place is None:
        near = alike(key, all_keys())
        raise InputError(
            f"there is no key '{key}'"
            + (f"; did you mean {' or '.join(near)}?" if near else "; without a key, all are listed")
        )
    script, name, node = place
    lines = [f"{key}: {meaning(node)}", f"  must be {words(node.type)}"]
    lines += [f"  group: {', '.join(names)}" for names in [choices_of(node)] if names]
    default = default_of(key if ANY in name.split(".") else name, node, cfg[script])
    lines += [f"  default: {default}"] if default is not None else []
    lines += [f"  in {command_of(script)} only"] if script != "train" else []
    below = [other for other in keys_of(script) if other.rpartition(".")[0] == name]
    lines += [f"  {other.removeprefix(f'{name}.')}: {meaning(keys_of(script)[other])}" for other in below]
    return "\n".join(lines)


def meaning(node: Node) -> str:
    """What a key sets, in the words of its field."""
    info = node.owner and node.owner.model_fields.get(node.name)
    return (info.description if info else None) or "a name that you choose"


def choices_of(node: Node) -> list[str]:
    """Files of the group that sets the key."""
    group = node.extra.get(GROUP)
    return sorted(path.stem for path in (REPOSITORY / "conf" / group).glob("*.yaml")) if group else []


def default_of(key: str, node: Node, cfg: DictConfig) -> str | None:
    """Value of the key in a composed configuration, else what an absent key means; None of a section."""
    if any(is_section(kind) or picked(kind) for kind in node.sections):
        return "null" if _select(cfg, key) is None and type(None) in _members(node.type) else None
    value = _select(cfg, key, ...)
    if value is ...:
        info = node.owner and node.owner.model_fields.get(node.name)
        return None if info is None or info.is_required() else shown(info.default)
    return None if isinstance(value, DictConfig) and len(value) else shown(_plain(value))


def _members(kind: Any) -> tuple:
    return getattr(kind, "__args__", ())


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _select(cfg: DictConfig, key: str, otherwise: Any = None) -> Any:
    try:
        return OmegaConf.select(cfg, key, default=otherwise, throw_on_missing=True)
    except OmegaConfBaseException:  # not given, or in terms of what is not
        return "(must be given)"


def page() -> str:
    """The content of docs/configuration.md."""
    cfg = Configurations([])
    lines = [HEAD]
    for script in SCRIPTS:
        own = {k: n for k, n in keys_of(script).items() if script == "train" or k not in keys_of("train")}
        lines += _tables(script, own, cfg[script])
    return "\n".join(lines).rstrip() + "\n"


def _tables(script: str, keys: Mapping[str, Node], cfg: DictConfig) -> Iterator[str]:
    yield f"## Keys of {command_of(script)}" + ("" if script == "train" else " alone") + "\n"
    yield "| key | it must be | default | meaning |"
    yield "|---|---|---|---|"
    for key, node in keys.items():
        # rewards stand in four places; they are described once
        if key.startswith(("evaluation.rewards.", "evaluation.oracle.", "validation.held_out.")):
            continue
        default = None if key in HIDDEN else default_of(key, node, cfg)
        cells = [f"`{key}`", words(node.type), "" if default is None else f"`{default}`", meaning(node)]
        yield "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"
    yield ""


HIDDEN = ("run_dir", "logger.NAME.folder", "model.backbone.weights", "pair_export.file", "runs")


class Configurations(dict[str, DictConfig]):
    """The configuration of each script, composed with the choices of a command when it is asked for.

    Raises InputError for choices that the script does not have.
    """

    def __init__(self, overrides: Sequence[str]):
        super().__init__()
        self.overrides = list(overrides)

    def __missing__(self, script: str) -> DictConfig:
        cfg = composed(script, ["run_dir=RUN", *self.overrides])
        if self.overrides:
            refuse(faults(SCRIPTS[script], resolved(cfg)))
        self[script] = cfg
        return cfg


def check_asked(keys: Sequence[str], overrides: Sequence[str]) -> None:
    """Raise InputError for a command of assignments alone, which asks for no key."""
    if overrides and not keys:
        name = overrides[0].partition("=")[0].lstrip("+~")
        raise InputError(
            f"{overrides[0]} sets a key, and no key is named that is to be explained; did you mean "
            f"python -m capo.cli.explain {name}?"
        )


def main(command: Sequence[str] | None = None) -> int:
    """Explain the keys of the command line, or list all; return the exit code."""
    given = list(sys.argv[1:] if command is None else command)
    keys, overrides = [a for a in given if "=" not in a], [a for a in given if "=" in a]
    try:
        if {"-h", "--help"} & set(keys):
            print(__doc__)
            return 0
        check_asked(keys, overrides)
        if "--page" in keys:
            print(page(), end="")
        elif keys:
            cfg = Configurations(overrides)
            print("\n".join(explained(key, cfg) for key in keys))
        else:
            for key, (_, node) in all_keys().items():
                print(f"{key}: {meaning(node)}")
    except Exception as error:
        return refused(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())

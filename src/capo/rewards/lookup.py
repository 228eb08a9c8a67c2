"""Look a scorer up by its dotted name, and build it from its config.

`capo.rewards.worker` does so in another Python environment: this needs only the standard library of Python
3.7 or newer.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
import sys
import types
from typing import Any

# These import nothing of this package, which would load torch beside their tensorflow.
STANDALONE = ("capo.rewards.vila",)


def build(node, find=None) -> Any:
    """Return `node` with each `{_target_: module.name, ...}` in it replaced by its call, innermost first.

    `_args_` are positional arguments; `_partial_: true` binds the arguments without calling. `find` looks a
    target up by its name; by default it must be a scorer (`scorer`).
    """
    if isinstance(node, list):
        return [build(inner, find) for inner in node]
    if not isinstance(node, dict):
        return node
    given = {
        key: build(value, find)
        for key, value in node.items()
        if key not in ("_target_", "_partial_", "_convert_", "_recursive_")
    }
    if "_target_" not in node:
        return given
    target, positional = (find or scorer)(node["_target_"]), given.pop("_args_", [])
    return (
        functools.partial(target, *positional, **given)
        if node.get("_partial_")
        else target(*positional, **given)
    )


def made(node) -> Any:
    """Return the scorer that a reward's config names: `build(node)`.

    Raises TypeError for one that cannot be called with images, with what to write where it is `_partial_`.
    """
    target, bound = scorer(node["_target_"]), node.get("_partial_")
    if inspect.isclass(target) and bound:
        raise TypeError(f"{node['_target_']} is a class, which is constructed: leave out `_partial_: true`")
    hint = "; for a function of (images, prompts) add `_partial_: true`"
    arguments = {key: value for key, value in node.items() if key[:1] != "_"}
    if inspect.isfunction(target) and not bound:
        try:
            inspect.signature(target).bind(*node.get("_args_", ()), **arguments)
        except TypeError as error:
            raise TypeError(f"{node['_target_']}: {error}{hint}") from None
    found = build(node)
    if not callable(found):
        raise TypeError(f"{node['_target_']} makes {found!r}, which is not callable{hint}")
    return found


def scorer(path) -> Any:
    """Return the target of a scorer: `locate(path)`, which must be a scorer where it is of this package.

    Raises ImportError otherwise.
    """
    found = locate(path)
    if path.startswith("capo.") and not is_scorer(found, path.rpartition(".")[0]):
        raise ImportError(
            f"{path} is no scorer: what this package may call here is a class or function that its module "
            "defines and that is called with (images, prompts)"
        )
    return found


def is_scorer(found, module):
    """Whether `found` is a class or function of `module` itself that is called with (images, prompts).

    A class with `configurable = False` is none, since it would start programs that a configuration names.
    """
    if getattr(found, "__module__", None) != module or inspect.isabstract(found):
        return False
    call = found.__call__ if inspect.isclass(found) else found
    if not inspect.isfunction(call) or not getattr(found, "configurable", True):
        return False
    names = list(inspect.signature(call).parameters)
    return names[1 if inspect.isclass(found) else 0 :][:2] == ["images", "prompts"]


def locate(path) -> Any:
    """Return the object at the dotted path `module.name`, importing the longest part that is a module.

    Raises ImportError for a path through what that module has imported, such as `module.os.system`.
    """
    module, names = path, []
    while True:
        module, _, name = module.rpartition(".")
        names.insert(0, name)
        if not module:
            raise ImportError(f"{path} is not a dotted path module.name")
        try:
            found = load(module)
        except ModuleNotFoundError as error:
            if "." in module and error.name == module:  # it may be a class with a method
                continue
            raise
        for name in names:
            found = getattr(found, name)
            if isinstance(found, types.ModuleType) or name.startswith("__"):
                raise ImportError(
                    f"{path} leads through {name} of {module}; give the name of a class or function and the "
                    "module that defines it"
                )
        return found


def load(module):
    """Import `module`.

    A module in STANDALONE, and any module of capo where capo is not installed, is loaded from its file,
    without the package around it.
    """
    if module in sys.modules:
        return sys.modules[module]
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    file = os.path.join(root, *module.split(".")) + ".py"
    if module not in STANDALONE:
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != "capo" or not os.path.isfile(file):
                raise
    spec = importlib.util.spec_from_file_location(module, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no module", name=module)
    found = sys.modules[module] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found

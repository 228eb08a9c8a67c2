"""The templates of this package's pages; importing this takes no time, unlike the pages' modules."""

from collections.abc import Callable
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from capo.runtime.terminal import printable


@cache
def page_template(name: str, *filters: Callable) -> Template:
    """Template of a page, compiled once; it may use `filters` by their functions' names.

    Values are escaped, their control characters written out, and an undefined one is an error.
    """
    environment = Environment(
        loader=PackageLoader("capo.evaluation.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: printable(value) if type(value) is str else value,  # not of Markup
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {function.__name__: function for function in filters}
    return environment.get_template(name)

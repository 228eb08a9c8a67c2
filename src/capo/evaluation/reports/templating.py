"""The templates of this package's pages; importing this takes no time, unlike the pages' modules."""

from jinja2 import Environment, PackageLoader, StrictUndefined


def page_environment() -> Environment:
    """Jinja environment of this package's pages: values are escaped, and an undefined one is an error."""
    return Environment(
        loader=PackageLoader("capo.evaluation.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

"""Turn a command line into objects and run a stage; the only package that uses Hydra and OmegaConf."""

from capo.cli.resolvers import register

register()  # on import, so that every configuration has the resolvers, also in the workers of a launcher

"""From a command line to objects: the only home of Hydra and OmegaConf."""

from capo.cli.resolvers import register

register()  # here, so that no configuration is read without them, in the workers of a launcher too

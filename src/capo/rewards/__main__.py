"""`python -m capo.rewards check NAME`: starts the program in `capo.cli.rewards`, which composes the configuration."""

import runpy

if __name__ == "__main__":
    runpy.run_module("capo.cli.rewards", run_name="__main__", alter_sys=True)

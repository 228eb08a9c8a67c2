"""Run `python -m capo.rewards check NAME`, whose program is `capo.cli.rewards`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("capo.cli.rewards", run_name="__main__", alter_sys=True)

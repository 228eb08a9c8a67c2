"""Public benchmarks: official prompt lists, the layouts that official scorers read, and their results.

One module states one benchmark as data (`layout.Benchmark`): a function that reads the official list and
returns it with the files that its scorer reads.
"""

from capo.evaluation.benchmarks.geneval import geneval
from capo.evaluation.benchmarks.layout import Benchmark, Official, Picture

__all__ = ["Benchmark", "Official", "Picture", "geneval"]

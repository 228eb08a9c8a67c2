"""Public benchmarks: official prompt lists, the layouts that official scorers read, and their results.

One module states one benchmark as data (`layout.Benchmark`): a function that reads the official list and
returns it with the files that its scorer reads.
"""

from capo.evaluation.benchmarks.dpg import dpg
from capo.evaluation.benchmarks.genai import genai
from capo.evaluation.benchmarks.geneval import geneval
from capo.evaluation.benchmarks.hpsv2 import hpsv2
from capo.evaluation.benchmarks.layout import Benchmark, Official, Picture
from capo.evaluation.benchmarks.parti import parti
from capo.evaluation.benchmarks.t2i_compbench import t2i_compbench

__all__ = ["Benchmark", "Official", "Picture", "dpg", "genai", "geneval", "hpsv2", "parti", "t2i_compbench"]

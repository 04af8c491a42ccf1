"""Mambacus: fine-tune, merge, evaluate, run and measure Mamba (selective state-space) language models.

Importing this package loads neither torch nor any other heavy library, so that ``mambacus --help`` is instant.
Start reading at ``mambacus/models/mamba.py`` (the model), ``mambacus/ops`` (the kernels) or ``mambacus/cli.py``
(the verbs).
"""

__version__ = "0.1.0.dev0"

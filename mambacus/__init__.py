"""Mambacus: fine-tune, merge, evaluate, run and measure Mamba (selective state-space) language models.

Importing this package loads neither torch nor any other heavy library, so that ``mambacus --help`` is instant.
Start reading at ``mambacus/models/mamba.py`` (the model), ``mambacus/ops`` (the kernels) or ``mambacus/cli.py``
(the verbs).
"""

__version__ = "0.1.0.dev0"

import os

# How often a waiting OpenMP thread looks before it sleeps. By default it looks for milliseconds, which makes two
# threads many times slower than one as soon as another program wants the cores: decoding fell from 12 to 1 tokens
# a second. libgomp reads this when torch loads it; set the variable yourself to choose otherwise.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

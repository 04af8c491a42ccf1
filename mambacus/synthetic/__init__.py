"""Tasks made from a seed, and the two arms that learn them: what `mambacus controlled` is built from.

A task (`copying`, `phonebook`, `mqar`, `addition`, `words`) draws rows of one difficulty ``x``; `examples` splits them
into training, validation and test rows; `arms` sizes a Mamba and a Transformer alike; `training` trains both in one
loop; `recipe`, `runs` and `verdicts` are the study around them.
"""

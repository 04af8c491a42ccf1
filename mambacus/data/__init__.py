"""The data floor: word problems, prompts, the layout of ``--data-dir`` and the corpus of the embedded model."""

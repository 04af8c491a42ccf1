"""Evaluation: our lm_eval model, its tasks over local files, math problems and the grading of their answers."""

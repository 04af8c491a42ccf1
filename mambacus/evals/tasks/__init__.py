"""lm_eval's own task definitions over local JSONL files: one YAML a task, `local.py` reads the rows.

Prompts, metrics and few-shot defaults are those of the installed lm_eval (a test compares them); only the source of the
documents differs. Plain ``lm_eval --include_path mambacus/evals/tasks --metadata '{"data_dir": "..."}'`` runs them too.
"""

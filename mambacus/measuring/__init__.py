"""Measuring speed and memory: `timing` runs a thunk fairly, `cases` says what is measured, `worker` measures it."""

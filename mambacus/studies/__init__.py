"""A study as data: the recipe, the plan of commands it stands for, and what of the plan is done already.

Imports no command and no torch: the commands' configuration classes are handed in.
"""

"""Records -> comparisons, tables, plots and one HTML page.

Nothing in this folder imports torch: a page can be drawn again on any machine from the JSON records alone.
"""

"""Dense to residual; the files are read in the order in which they run: statistics, alignment, allocation, fitting,
refinement; `conversion.py` calls them.
"""

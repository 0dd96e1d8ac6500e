"""Make pairs, or look at those there are.

Read `check` (what is in a recipe's pairs), `mine` (hard negatives) and `docstrings` (pairs from installed packages).
"""

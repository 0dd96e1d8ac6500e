"""Make pairs, or look at those there are.

Read `check` (what is in a recipe's pairs), `mine` (hard negatives) and `docstrings` and `harvest`
(pairs from installed packages, with a test held out).
"""

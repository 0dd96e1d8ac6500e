"""Make pairs, or look at those there are.

Read `check` (what is in a recipe's pairs), `rerank` (scores by a cross-encoder), `mine` (hard negatives) and
`docstrings` and `harvest` (pairs from installed packages, with a test held out).
"""

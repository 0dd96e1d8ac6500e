"""Make pairs, or look at those there are.

Read `check` (what is in a recipe's pairs), `rerank` (scores by a cross-encoder), `mine` (hard negatives), `docstrings`
and `harvest` (pairs from installed packages, with a test held out); then, for documents without queries, `prompt` (how
queries are asked for), `writers` (who writes them), `write_queries` (kept as they come) and `keep_queries` (which of
them are of use).
"""

"""Check, mine and make training pairs.

Read `check` (report on a recipe's pairs), `rerank` (scores by a cross-encoder), `mine` (hard negatives), `docstrings`
and `harvest` (pairs from installed packages, with a held-out test); then, for documents without queries, `prompt`
(from a document to a chat), `writers` (chat models), `write_queries` (queries of each document, in a file) and
`keep_queries` (filters for queries).
"""

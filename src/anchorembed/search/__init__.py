"""From a corpus to the texts nearest a query.

Read `index` (a corpus in LanceDB), `vector_cache` (texts embedded once, for evaluation) and `ray` (embedding on many
machines).
"""

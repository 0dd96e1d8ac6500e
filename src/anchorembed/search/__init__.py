"""From a corpus to the texts nearest a query.

Read `vector_cache` (texts are embedded once), `index` (a corpus in LanceDB) and `ray` (embedding on many machines).
"""

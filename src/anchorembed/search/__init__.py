"""From a corpus to the texts nearest a query.

Read `vector_cache` (embed a list of texts once), `index` (a corpus in LanceDB) and `ray` (embed on many machines).
"""

"""From a corpus to the documents nearest a query.

Read `columns` (vectors in Arrow tables and Parquet files), `manifest` and `index` (a corpus in LanceDB), `vector_cache`
(texts embedded once, for evaluation) and `ray` (embedding on many machines).
"""

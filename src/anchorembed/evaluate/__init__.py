"""From a model and a test to a score.

Read `ranking` (documents in order of their cosine), `metrics` (nDCG, Spearman and others, from numbers alone),
`task_types` (retrieval, reranking, similarity, pairs, classification: texts to embed, and metrics), `tasks` (how tasks
embed texts and are run), `quick` (a fixed part of a task), `local` (a folder or file as a task), `mteb` (mteb's tasks),
`find` (tasks by name), `size_table` (size against quality), `isotropy` (how evenly vectors fill their space),
`held_out` (pairs as a small retrieval test), `statistics` (tests and intervals) and `difference` (is one model better
than another).
"""

"""From files to pairs of texts.

Read `rows` (any file format to rows, with the place of each), `documents`, `beir` and `pairs` (rows to records),
`judged` (test files with scores and labels), `store` (pairs on disk, memory-mapped) and `sampling` (which pairs make a
step).
"""

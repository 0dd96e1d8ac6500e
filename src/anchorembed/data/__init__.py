"""From files to pairs of texts.

Read `rows` (what a row is, its checks, its faults), `formats` (files of any format to rows), `hub` (data sets on the
Hugging Face hub to rows), `documents`, `beir` and `pairs` (rows to records), `evaluation_files` (test files with scores
and labels), `store` (pairs and corpora on disk, memory-mapped), `split` (which pairs are held out) and `sampling`
(which pairs form a step).
"""

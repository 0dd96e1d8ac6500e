"""From a model and a test to a score.

Read `ranking` (documents in order, metrics of each query), `metrics` (the scores of each kind of task), `tasks` (what a
task is, and running some), `mteb` (mteb's tasks), `find` (tasks by name, folder or file) and `isotropy` (how evenly
vectors fill their space).
"""

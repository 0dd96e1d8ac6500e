"""The command line; all it does is in `api`, `train`, `fit`, `demo` and the folders below them.

Read `commands` (each verb), `terminal` (what is printed), `root` (the command without its verbs), `options` (of
several commands), `recipes` (a command's recipe) and `main`.
"""

"""The command line; all it does is in `api`, `train`, `fit`, `demo` and the folders below them.

Read `terminal` (what is printed), `app` (the application), `options` (of several commands), `recipes` (a command's
recipe), `training` and `using` (the commands), and `main`.
"""

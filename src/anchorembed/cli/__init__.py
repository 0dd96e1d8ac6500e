"""The command line; all it does is in `api`, `train`, `fit`, `demo` and the folders below them.

Read `terminal` (what is printed), `app` (the application), `options` (of several commands), `recipes` (a command's
recipe), `training_commands` and `using_commands`, and `main`.
"""

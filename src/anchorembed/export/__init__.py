"""From a trained model to what other software loads.

Read `card` (README.md of a trained or exported folder), `folder` (a sentence-transformers folder, reloaded and
compared before it is kept) and `push` (a folder to the model hub).
"""

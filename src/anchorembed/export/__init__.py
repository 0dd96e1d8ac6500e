"""From a trained model to what other software loads.

Read `folder` (a sentence-transformers folder, reloaded and compared before it is kept).
"""

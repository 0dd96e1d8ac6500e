"""From a trained model to what other software loads.

Read `run` (written, reloaded, compared, kept), `check` (what is compared) and `folder` (sentence-transformers').
"""

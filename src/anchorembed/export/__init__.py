"""From a trained model to what other software loads, and whether that gives the model's vectors.

Read `folder` (a sentence-transformers folder, reloaded and compared before it is kept), `clients` (vectors from an
endpoint or a library), `faults` (what a server can do wrong, computed by our own model), `probes` (the texts),
`cures` (what to do about each), `verify` (served vectors compared with the model's, and why they differ).
"""

"""From pairs and a model to a trained model.

Pure functions first: `cross_entropy`, `decoding`, `info_nce`, `gradcache`, `flops`, `memory`. Then the stages:
`stage` (what both share), `reconstruct` (Stage I), `contrast` (Stage II). Then what runs them: `checkpoint`, `loop`,
`prepare` (data and model of a recipe), `run` (both stages) and `profile` (where a step's time goes).
"""

"""Comparisons of training with Stage I and without.

Read `controls` (Stage I's experimental controls), `arms` (the models that are compared), `records` (results as typed
records), `results` (the results folder), `plan` (from a recipe to runs), `training` (the stages of an arm), `choose`
(Stage II's settings, from the grid), `run` (train and evaluate missing runs); then, from the results folder alone,
`analysis` (numbers of the report), `figures` and `report` (HTML and Markdown).
"""

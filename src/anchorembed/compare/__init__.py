"""With Stage I and without, side by side.

Read `controls` (Stage I as comparisons need it), `arms` (what is compared), `records` (what is kept of it), `results`
(the folder of what is finished), `plan` (what is to be run), `training` (the stages of an arm), `choose` (Stage II's
settings, from the grid), `run` (train, evaluate and keep what is missing); then, from the results folder alone,
`analysis` (numbers of the report), `figures` and `report` (the page).
"""

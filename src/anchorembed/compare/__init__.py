"""With Stage I and without, side by side.

Read `controls` (Stage I as comparisons need it), `arms` (what is compared), `results` (the folder of what is finished),
`run` (train and evaluate what is missing), `statistics` (tests and intervals), `gather`, `analysis`, `figures` and
`report` (from results to a page).
"""

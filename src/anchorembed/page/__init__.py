"""One page on what training did to a model, in one file that loads nothing.

Read `contents` (what the page shows, from models, texts and logs) with `vector_map` and `learning_curves`,
`run_contents` (that of a run's output folder), `drawings` (curves and maps as SVG) and `html` (the page).
"""

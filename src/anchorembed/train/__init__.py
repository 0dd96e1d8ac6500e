"""From pairs and a model to a trained model.

Pure functions first: `cross_entropy`, `decoding`, `contrastive_losses`, `gradcache`, `flops`. Then the stages:
`prepare` (data and model of a recipe), `stage` (the interface), `anchor_choice`, `reconstruction_batch`, `anchors`,
`reconstruction_loss`, `anchor_gain` and `reconstruct` (Stage I), `contrast` (Stage II); `read` (read a vector). Then
what runs them: `memory_estimate` and `memory` (does it fit), `checkpoint`, `plan` (what may be continued),
`kept_recipe` (in the output folder), `loop` (the steps), `together` (several processes), `verdict` (whether training
helped), `run` (both stages), `default_recipe` (of pairs and a model alone), `sizing` (steps that fit into some
minutes), `clock` (fitted anew as time goes), `first_steps` (how long those take) and `profile` (where a step's time
goes).
"""

"""From pairs and a model to a trained model.

Pure functions: `cross_entropy`, `decoder_input`, `contrastive_losses`, `gradcache`, `flops`. Stages: `prepare` (data
and model of a recipe), `stage` (the interface), `anchor_choice_loss`, `reconstruction_batch`, `anchors`,
`reconstruction_loss`, `anchor_gain` and `reconstruct` (Stage I), `contrast` (Stage II), `read_vector` (what the decoder
reads from a vector). Running them: `memory_estimate` and `check_memory` (does a stage fit), `checkpoint`, `resume_plan`
(what a checkpoint may be resumed by), `kept_recipe` (the recipe in the output folder), `optimizer` (AdamW, the learning
rate), `loop` (the steps), `distributed` (several processes), `verdict` (did training help), `run` (both stages),
`default_recipe` (for pairs and a model). Measuring: `profile` (where a step's time goes), and for a run of some minutes
`time_budget` (steps that fit), `clock` (fit again after each arm) and `step_times`.
"""

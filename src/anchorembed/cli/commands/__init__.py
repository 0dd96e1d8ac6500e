"""The verbs: those that look at pairs, add to them and train (`training`), and those that use a model (`using`)."""

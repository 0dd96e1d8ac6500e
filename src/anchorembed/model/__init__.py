"""From texts to vectors.

Read `load` (find and read a model), `template` (what surrounds a text), `tokens` (text to ids), `packing` (texts end
to end), `attention` (texts apart), `backbone` (the decoder as functions), `adapters` (LoRA), `verify` (measured against
the model's own forward pass), `fast` (attention kernel, compiled layers), `vectors` (cosines), `embedder` (all of it as
one class) and `export`.
"""

"""From texts to vectors.

Read `load` (find and read a model), `intact` (refuse one that is not whole), `template` (what surrounds a text),
`tokens` (text to token ids), `cutting` (of long texts no more than is kept), `positions` (how long they may be),
`packing` (texts end to end), `attention` (which keeps them apart), `backbone` (the decoder as three functions),
`adapters` (LoRA on it), `reproduce` (its scales measured, its logits compared with the model's own), `fast` (the varlen
kernel, compiled layers), `older` (what transformers 4 reads of a saved model), `vectors` (unit vectors, cosines),
`smaller` (fewer components, int8, bits), `existing` (what a sentence-transformers embedder says of itself),
`embedder` (all of it as one class), and `langchain` and `llamaindex` (that as those two know it).
"""

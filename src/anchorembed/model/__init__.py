"""From texts to vectors.

Read `load` (find and read a model), `default_model` (download SmolLM2), `gguf` (GGUF files), `intact` (refuse damaged
weights), `template` (tokens around a text), `tokens` (text to token ids), `first_tokens` (long texts are tokenised in
part only), `positions` (length limits), `packing` (texts end to end), `attention` (causal, within each text),
`backbone` (the decoder as three functions), `adapters` (LoRA), `check_packed_loss` (scales are measured, the loss of
packed texts is compared with the model's own), `choose_attention` (varlen or buckets), `compile_layers`,
`transformers4` (settings for transformers 4), `vectors` (unit vectors, cosines), `truncate_and_quantize` (fewer
components, int8, bits), `sentence_transformers_settings` (of an embedder saved by it), `metadata` (`anchorembed.json`),
`embedder` (the class that users load), and `langchain` and `llamaindex` (an embedder as an object of theirs).
"""

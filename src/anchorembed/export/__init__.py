"""Export a trained model for other software, and verify the vectors of software that serves it.

Read `run` (write, reload, compare, keep), `check` (vectors that are compared), `folder` (for sentence-transformers),
`gguf` (for llama.cpp), `graph` (the decoder as one graph), `onnx` and `openvino` (for engines that run graphs), `card`
(README.md of a trained or exported folder) and `push` (upload to the model hub). Then, to verify served vectors:
`clients` (vectors from an endpoint or a library), `faults` (faults of servers, simulated by our model), `probes` (texts
to send), `served` (their vectors), `cures` (what to do about each fault) and `verify` (why vectors differ).
"""

"""From a trained model to what other software loads, and whether that gives the model's vectors.

Read `run` (written, reloaded, compared, kept), `check` (what is compared), `folder` (sentence-transformers'), `gguf`
(llama.cpp's), `graph` (tokens to vectors as one graph), `onnx` and `openvino` (which run it), `card` (README.md of a
trained or exported folder) and `push` (a folder to the model hub). Then what compares served vectors with the model's:
`clients` (vectors from an endpoint or a library), `faults` (what a server can do wrong, computed by our own model),
`probes` (the texts), `cures` (what to do about each fault) and `verify` (why vectors differ).
"""

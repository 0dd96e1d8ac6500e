"""From a trained model to what other software loads.

Read `run` (written, reloaded, compared, kept), `check` (what is compared), `folder` (sentence-transformers'), `gguf`
(llama.cpp's), `graph` (tokens to vectors as one graph), `onnx` and `openvino` (which run it), `card` (README.md of a
trained or exported folder) and `push` (a folder to the model hub).
"""

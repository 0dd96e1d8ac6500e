"""Make tests/data/tokenizer.json: a byte-level BPE of 384 entries, trained on the sentences below."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SENTENCES = [
    "Read a file line by line and return the lines as a list of strings.",
    "Write the rows of a table to a file, one row a line.",
    "Open a connection to the server and wait until it answers.",
    "Sort the values of a list in place and keep equal values in their order.",
    "Return the largest value of the list, or the default if the list is empty.",
    "Delete the folder and all the files in it, and do not follow links.",
]

tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
trainer = trainers.BpeTrainer(
    vocab_size=384, special_tokens=[], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
)
tokenizer.train_from_iterator(SENTENCES, trainer)
tokenizer.save(str(Path(__file__).with_name("tokenizer.json")), pretty=False)

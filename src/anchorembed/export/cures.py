"""What to do about each cause of differing vectors, for endpoints and for each library."""

from anchorembed.export.faults import Fault
from anchorembed.model.template import Prompts

CUT = "cut at another length"
REFUSED = "refused"
TOO_LONG = "refused, of long texts"
SCALE = "not normalised"
BATCH = "a text's vector changes with the texts sent along with it"
OTHER_MODEL = "vectors of another model"
UNKNOWN = "no known cause"

_TOKENIZER = (
    "Serve an exported folder with its own tokenizer.json, whose template puts it there; an engine that tokenises by "
    "its own rules (GGUF) needs it in the text or in its settings."
)
_TWICE = "Add the template once: send raw text to a server that has the exported tokenizer."
_POOLING = (
    "Set last-token pooling: --pooling last-token (text-embeddings-inference), --pooling last (llama-server), "
    '--pooler-config \'{{"pooling_type": "LAST"}}\' (vLLM).'
)
_NEWLINES = "Find the client or server that replaces them, and turn it off; LangChain's Hugging Face classes do it."
_CURES: dict[str, str] = {
    Fault.NO_END: _TOKENIZER + " In GGUF it is tokenizer.ggml.add_eos_token.",
    Fault.NO_SUFFIX: _TOKENIZER,
    Fault.NO_HEADER: _TOKENIZER,
    Fault.ONLY_BOS: _TOKENIZER,
    Fault.NO_BOS: _TOKENIZER,
    Fault.END_TWICE: _TWICE,
    Fault.ANOTHER_BOS: _TWICE,
    Fault.HEADER_TWICE: _TWICE,
    Fault.MEAN: _POOLING,
    Fault.FIRST: _POOLING,
    Fault.NO_PROMPT: "The queries were sent with {prompt!r} before them: find what removes it.",
    Fault.NO_DOCUMENT_PROMPT: "The documents were sent with {document_prompt!r} before them: find what removes it.",
    Fault.PROMPT_TWICE: "The server puts {prompt!r} before queries itself: turn that off, or send queries without it.",
    Fault.PROMPT_ON_DOCUMENTS: "The server puts {prompt!r} before all texts: turn its default prompt off.",
    Fault.NEWLINES: _NEWLINES,
    Fault.NEWLINES_OF_TEXT: _NEWLINES,
    Fault.STRIPPED: "Turn it off, or strip texts on all sides alike, before they are embedded here, too.",
    Fault.SPECIAL_TOKENS: "An engine that reads tokenizer.json alone does so: remove such names from texts first.",
    Fault.ONE_TEXT: "llama.cpp does so: strip texts, and remove such names from them first.",
    CUT: (
        "Set the server's limit to {limit} tokens: max_seq_length in the exported folder, --max-model-len and "
        "truncate_prompt_tokens (vLLM), --ctx-size and --ubatch-size (llama-server). Where it has one limit for "
        "both sides, cut in the client, or train with equal data.query_tokens and data.document_tokens."
    ),
    REFUSED: "The server takes no such text: do not send it, and embed it here where it is needed.",
    TOO_LONG: "Cut texts at {limit} tokens, template included, in the client, or let the server do it: --auto-truncate "
    "(text-embeddings-inference), truncate_prompt_tokens (vLLM).",
    SCALE: "Scale vectors to length 1 after receiving them, or compare them by cosine, not by dot product.",
    BATCH: "Padding is pooled or attended to: send texts one by one, or pad on the right and pool the last real token.",
    OTHER_MODEL: "Check which model the server has loaded, and --served-name.",
    UNKNOWN: "Check that the served weights are this model's, and how the server computes; compare with --skip.",
}
_OF_LIBRARY: dict[tuple[str, str], str] = {
    ("langchain", Fault.NO_PROMPT): (
        'HuggingFaceEmbeddings(model_name=..., query_encode_kwargs={{"prompt_name": "query"}})'
    ),
    ("llamaindex", Fault.NO_PROMPT): "HuggingFaceEmbedding(model_name=..., query_instruction={prompt!r})",
    ("langchain", Fault.NO_DOCUMENT_PROMPT): (
        'HuggingFaceEmbeddings(model_name=..., encode_kwargs={{"prompt_name": "document"}})'
    ),
    ("llamaindex", Fault.NO_DOCUMENT_PROMPT): (
        "HuggingFaceEmbedding(model_name=..., text_instruction={document_prompt!r})"
    ),
    **{
        (library, CUT): f"{title} calls encode, which has one limit for both sides: cut texts at {{limit}} tokens "
        "first, or train with equal data.query_tokens and data.document_tokens."
        for library, title in (("langchain", "LangChain"), ("llamaindex", "LlamaIndex"))
    },
}
for _newlines in (Fault.NEWLINES, Fault.NEWLINES_OF_TEXT):
    _OF_LIBRARY["langchain", _newlines] = (
        "No argument turns this off. Write an Embeddings class of your own whose two methods call encode_document and "
        "encode_query of SentenceTransformer."
    )


def cure(cause: str, client: str, prompts: Prompts, limit: int) -> str:
    """What to do about a cause with a client; ``prompts`` are the model's, ``limit`` the side's limit in tokens."""
    text = _OF_LIBRARY.get((client, cause), _CURES[cause])
    return text.format(prompt=prompts.query, document_prompt=prompts.document, limit=limit)

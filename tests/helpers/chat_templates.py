"""Chat templates as known models have them, the special tokens they need, and what is derived from them."""

from anchorembed.model.template import Template

LLAMA3 = (
    "{{ bos_token }}<|start|>system<|stop|>\n\nToday Date: {{ strftime_now('%d %b %Y') }}\n\n<|eot|>"
    "{% for m in messages %}<|start|>{{ m.role }}<|stop|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
)
QWEN = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
)
PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
)
CASES = {
    "llama-3": (
        LLAMA3,
        ("<|start|>", "<|stop|>", "<|eot|>"),
        Template("<s>", "<|start|>user<|stop|>\n\n", "", "<|eot|>"),
    ),
    "qwen": (QWEN, ("<|im_start|>", "<|im_end|>"), Template("", "<|im_start|>user\n", "", "<|im_end|>")),
    "mistral": (MISTRAL, (), Template("<s>", "[INST] ", "[/INST]", "</s>")),
    "mistral-control-tokens": (MISTRAL, ("[INST]", "[/INST]"), Template("<s>", "[INST] ", "[/INST]", "</s>")),
    "gemma": (
        GEMMA,
        ("<start_of_turn>", "<end_of_turn>"),
        Template("<s>", "<start_of_turn>user\n", "", "<end_of_turn>"),
    ),
    "phi": (PHI, ("<|user|>", "<|assistant|>", "<|end|>"), Template("", "<|user|>\n", "", "<|end|>")),
    "base": (None, (), Template("<s>", "", "", "</s>")),
}

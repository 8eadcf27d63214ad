"""Chat templates in the manner of families that TRL carries no training version of.

Each marks what the assistant says with {% generation %}, as TRL needs it; `unmarked` is what a model comes with.
"""

# ruff: noqa: E501
import re

_ROLE = "{% for m in messages %}{% if m.role == 'assistant' %}"
_PROMPT = "{% if add_generation_prompt %}"

MARKED = {
    "smollm2": "{% for m in messages %}{% if loop.first and messages[0].role != 'system' %}<|im_start|>system\nYou are a "
    "helpful AI assistant<|im_end|>\n{% endif %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{% generation %}"
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + "
    "'<|im_end|>\n' }}{% endif %}{% endfor %}" + _PROMPT + "<|im_start|>assistant\n{% endif %}",
    "mistral": "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ ' ' + m.content + "
    "eos_token }}{% endgeneration %}{% elif m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}",
    "zephyr": _ROLE
    + "<|assistant|>\n{% generation %}{{ m.content + eos_token }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endif %}{% endfor %}"
    + _PROMPT
    + "<|assistant|>\n{% endif %}",
    "phi4": _ROLE + "<|im_start|>assistant<|im_sep|>{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    + _PROMPT
    + "<|im_start|>assistant<|im_sep|>{% endif %}",
    "granite": _ROLE + "<|start_of_role|>assistant<|end_of_role|>{% generation %}{{ m.content + '<|end_of_text|>' }}"
    "{% endgeneration %}{{ '\n' }}{% else %}{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + "
    "'<|end_of_text|>\n' }}{% endif %}{% endfor %}" + _PROMPT + "<|start_of_role|>assistant<|end_of_role|>{% endif %}",
    "olmo2": "{{ bos_token }}" + _ROLE + "<|assistant|>\n{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
    "{% if not loop.last %}{{ '\n' }}{% endif %}{% else %}{{ '<|' + m.role + '|>\n' + m.content + '\n' }}{% endif %}{% endfor %}"
    + _PROMPT
    + "<|assistant|>\n{% endif %}",
    "vicuna": "{% for m in messages %}{% if m.role == 'assistant' %}ASSISTANT: {% generation %}{{ m.content + eos_token }}"
    "{% endgeneration %}{{ '\n' }}{% elif m.role == 'user' %}{{ 'USER: ' + m.content + '\n' }}{% else %}{{ m.content + '\n\n' }}"
    "{% endif %}{% endfor %}" + _PROMPT + "ASSISTANT: {% endif %}",
    "llama2": "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set system = '<<SYS>>\n' + "
    "messages[0].content + '\n<</SYS>>\n\n' %}{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'assistant' %}{% generation %}{{ ' ' + m.content + ' ' + eos_token }}"
    "{% endgeneration %}{% else %}{{ bos_token + '[INST] ' + (system if loop.first else '') + m.content + ' [/INST]' }}"
    "{% endif %}{% endfor %}",
    "deepseek_llm": "{{ bos_token }}"
    + _ROLE
    + "Assistant: {% generation %}{{ m.content + eos_token }}{% endgeneration %}"
    "{% elif m.role == 'user' %}{{ 'User: ' + m.content + '\n\n' }}{% else %}{{ m.content + '\n\n' }}{% endif %}"
    "{% endfor %}" + _PROMPT + "Assistant: {% endif %}",
    "exaone": _ROLE
    + "[|assistant|]{% generation %}{{ m.content + '[|endofturn|]' }}{% endgeneration %}{{ '\n' }}{% elif m.role "
    "== 'user' %}{{ '[|user|]' + m.content + '\n' }}{% else %}{{ '[|system|]' + m.content + '[|endofturn|]\n' }}"
    "{% endif %}{% endfor %}" + _PROMPT + "[|assistant|]{% endif %}",
    "baichuan": "{% for m in messages %}{% if m.role == 'assistant' %}<reserved_107>{% generation %}{{ m.content }}"
    "{% if loop.last %}{{ eos_token }}{% endif %}{% endgeneration %}{% elif m.role == 'user' %}{{ '<reserved_106>' + "
    "m.content }}{% else %}{{ m.content }}{% endif %}{% endfor %}" + _PROMPT + "<reserved_107>{% endif %}",
}


def unmarked(template: str) -> str:
    """The template as its model comes with it."""
    return re.sub(r"\{%-?\s*(?:end)?generation\s*-?%\}", "", template)

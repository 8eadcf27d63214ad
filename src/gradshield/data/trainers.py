"""Which parts of a row a trainer trains on: what `--trainer` names, and all that differs between them.

| trainer      | turns of `prompt` | a turn's loss is off with        | `system` column beside turns | `functions` |
|--------------|-------------------|----------------------------------|------------------------------|-------------|
| trl          | are not trained   | nothing: TRL has no such key     | is ignored                   | are ignored |
| axolotl      | are trained       | `train: false` or                | becomes the system turn      | are ignored |
|              |                   | `training: false`                |                              |             |
| llamafactory | are trained       | nothing                          | becomes the system turn      | are ignored |
| openai       | are trained       | `weight: 0`                      | is ignored                   | are tools   |

axolotl reads the key that its `message_field_training` names. Labels such as KTO's never switch a loss off: supervised
fine-tuning with any of them trains on the answer whatever its label.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rules:
    """How one trainer reads a row."""

    verbatim: bool = False  # turns reach the chat template as they are, whatever their roles and parts
    prompt: bool = True  # assistant turns of a prompt are trained on
    off: tuple[str, ...] = ()  # keys of a turn that switch its loss off when they are 0 or false
    system: bool = False  # a system column beside a list of turns is read
    functions: bool = False  # OpenAI's older `functions` and `function_call` are read


RULES: dict[str, Rules] = {
    "trl": Rules(verbatim=True, prompt=False),
    "axolotl": Rules(off=("train", "training"), system=True),
    "llamafactory": Rules(system=True),
    "openai": Rules(off=("weight",), functions=True),
}

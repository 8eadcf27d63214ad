"""`train.py` of a run folder: fine-tunes the run's model on the kept rows with TRL, whatever their layout.

The rows reach TRL as tokens and labels, encoded as they were scored. So TRL does not need to know the layout or the
chat template (it does not know that of the embedded model, for example).
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gradshield.base.settings import FilterSettings
from gradshield.base.storage import write_text
from gradshield.data.formats import VARIABLES
from gradshield.data.templates import form_of
from gradshield.data.turns import is_missing

_NATIVE = ("messages", "prompt_completion")  # TRL takes these, where they hold lists of turns
_FROM_VALUE = " of from/value"  # TRL reads such turns under `conversations` only
_NOT_TEXT = " with content that is not text"  # for one such row, `datasets` parses JSON in the content of all rows
_INSTEAD = "use the run's train.py, or"
SCRIPT = '''"""Fine-tunes the model of this run on the rows that GradShield kept, with TRL.

Flags are those of TRL's SFTConfig: python train.py --max_steps 2 --learning_rate 1e-5
Start it in the folder where the filter ran, if the model was named by a relative path.
"""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import HfArgumentParser
from trl import SFTConfig, SFTTrainer

from gradshield.base.errors import UserError
from gradshield.screen.kept import kept_rows


def main() -> None:
    run = Path(__file__).resolve().parent
    on_cpu = not torch.cuda.is_available()
    parser = HfArgumentParser(SFTConfig)
    parser.set_defaults(output_dir=str(run / "trained"), report_to="none", use_cpu=on_cpu, bf16=not on_cpu)
    (config,) = parser.parse_args_into_dataclasses()
    config.max_length = None  # the rows are cut as they were scored
    try:
        model, rows = kept_rows(run)
    except UserError as error:
        sys.exit(f"train.py: {error}")
    quantized = getattr(model.net, "is_quantized", False)  # their adapter is trained instead
    net = model.net if quantized else model.net.float().requires_grad_(True)
    trainer = SFTTrainer(
        model=net,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=model.tokenizer,
        peft_config=LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM") if quantized else None,
    )
    trainer.train()
    if not quantized and hasattr(net.config, "quantization_config"):  # left by a GGUF, whose weights are plain floats
        del net.config.quantization_config
    trainer.save_model()


if __name__ == "__main__":
    main()
'''


def write_script(out: Path, settings: FilterSettings) -> None:
    """Writes `train.py` into the run folder, where the rows are for TRL."""
    if settings.trainer == "trl":
        write_text(out / "train.py", SCRIPT)


def trl_trains(tokenizer: Any, layout: str = "messages", forms: Iterable[str] = ()) -> str:
    """Whether TRL itself trains this model on such rows with `SFTConfig(assistant_only_loss=True)`, and what else."""
    counts = Counter(forms)
    if note := trl_note(counts):
        return f"not by itself: {note}"
    own = "the train.py that `filter` writes"
    if "other columns" in counts:
        return f"not by itself: it reads messages, prompt and completion, conversations or text only; {own} can"
    if layout == "text":
        return f"yes, without assistant_only_loss, or with {own}"
    if form_of(tokenizer).training is None:
        return f"not by itself: it has no training version of this chat template; {own} can"
    if layout not in _NATIVE:
        return f"not by itself: it does not read the layout {layout} with assistant_only_loss; {own} can"
    return f"yes, with assistant_only_loss, if rows hold lists of turns; {own} always can"


def trl_form(record: dict) -> str:
    """What TRL reads of a row, in words. It can't load rows of several forms from one file, and a column that is named
    "beside" another stops it in any row."""
    filled = {name for name, value in record.items() if not is_missing(value)}
    if {"prompt", "completion"} <= filled:
        named, text = ["prompt", "completion"], isinstance(record["prompt"], str)
        stops = {"messages"} if text else {"messages"} - filled
        stops |= {"text"} - filled if text else set()
    else:
        named, stops = [name for name in ("messages", "conversations") if name in filled], {"prompt", "completion"}
        text = isinstance(record.get("messages"), str)
        named = named or ["text"] * ("text" in filled)
    if not named:
        return "other columns"
    form = "/".join(named) + " as text" * text
    lists = [(name, record[name]) for name in named if isinstance(record[name], list)]
    turns = [(name, turn) for name, value in lists for turn in value if isinstance(turn, dict)]
    read = [turn for name, turn in turns if name != "conversations"]
    if any(not turn.get("role") for turn in read):
        form += _FROM_VALUE
    if any(not isinstance(turn.get(key), str | None) for _, turn in turns for key in ("content", "value")):
        form += _NOT_TEXT
    if read:  # TRL decides by any one of these columns whether the rows are conversations
        stops |= {name for name in ("chosen", "rejected") if not _opens_with_a_role(record.get(name))}
    if beside := sorted((stops | {"image", "images"}) & set(record)):
        form = f"{' and '.join(beside)} beside {form}"
    if isinstance(variables := record.get(VARIABLES), dict):
        form += f" with {VARIABLES} {', '.join(sorted(variables))}"
    return form[:100]


def _opens_with_a_role(turns: Any) -> bool:
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and "role" in turns[0]


def note_of_kept(settings: Mapping[str, Any], forms: Iterable[str], verdicts: Iterable[str]) -> str:
    """`trl_note` of the kept rows; empty with the settings of a run whose rows do not go to TRL as they are."""
    if settings.get("trainer", "trl") != "trl" or settings.get("columns"):
        return ""
    return trl_note(form for form, verdict in zip(forms, verdicts) if verdict == "kept")


def trl_note(forms: Iterable[str]) -> str:
    """Why TRL can't load rows of these forms from one file, and what to do; empty where it can."""
    counts = Counter(forms)
    if len(counts) > 1:
        listed = ", ".join(f"{form}: {count:,}" for form, count in counts.most_common(4)) + ", …" * (len(counts) > 4)
        loaded = len({form.replace(_NOT_TEXT, "") for form in counts}) == 1
        so = "TRL reads content that is valid JSON as its value" if loaded else "TRL can't load them from one file"
        return f"the rows differ in layout ({listed}), so {so}; {_INSTEAD} split the file"
    only = next(iter(counts), "")
    names, beside, form = only.partition(" beside ")
    if not beside:
        return f"TRL fails on {only}; {_INSTEAD} name them role and content" if _FROM_VALUE in only else ""
    unless = ", unless the model accepts images" if "image" in names else ""
    return f"TRL fails on {names} beside {form}{unless}; {_INSTEAD} drop {names}"

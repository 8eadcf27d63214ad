"""Hostile models: each a small change to a tiny one, and `gradshield check` must take it or refuse it in one line.

`campaign(count, seed)` runs so many of them and returns how they ended; as a script: models.py [COUNT [SEED]].
"""

import io
import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import tiny_net, tiny_tokenizer

from torture import adapters, ggufs, tokenizer, weights  # noqa: F401  # which name their cases
from torture.changes import CASES, VALUES, Change
from torture.ggufs import write_gguf

PATIENCE = 200  # seconds a case; one takes about one of computing


def anything(kind: str) -> Change:
    """A random change: of a byte or a few of some file, or of some value in some JSON file."""

    def apply(folder: Path, draw: random.Random) -> None:
        file = draw.choice(sorted(f for f in folder.iterdir() if f.is_file()))
        if file.suffix == ".json" and draw.random() < 0.7:
            content = json.loads(file.read_text())
            at = content
            while isinstance(at, dict) and at:
                key = draw.choice(sorted(at))
                if not (isinstance(at[key], dict) and at[key]) or draw.random() < 0.3:
                    at[key] = draw.choice(VALUES)
                    break
                at = at[key]
            file.write_text(json.dumps(content))
            return
        data = bytearray(file.read_bytes())
        for _ in range(draw.choice((1, 1, 4, 40))):
            if data:
                data[draw.randrange(min(len(data), draw.choice((64, 4096, 10**9))))] = draw.randrange(256)
        file.write_bytes(data[: draw.randrange(len(data) + 1)] if draw.random() < 0.2 else bytes(data))

    return apply


def sound_models(folder: Path) -> None:
    """The models that are then changed, one folder each."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    words = tiny_tokenizer()
    tiny_net(words).save_pretrained(folder / "llama")
    words.save_pretrained(folder / "llama")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(words), n_embd=32, n_layer=2, n_head=4, n_positions=256, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(folder / "gpt2")
    words.save_pretrained(folder / "gpt2")
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = get_peft_model(tiny_net(words), lora)
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "llama")
    adapted.save_pretrained(folder / "adapter")
    (folder / "gguf").mkdir()
    write_gguf(folder / "gguf" / "model.gguf", {})


def verdict(arguments: list[str], work: Path) -> tuple[str, str]:
    """("ok", "refused", "traceback" or "timeout", what was said) of `gradshield check` in a process of its own."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.setsid()
        said = io.StringIO()
        code: Any = 0
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 2)
        try:
            from gradshield.cli.commands import main

            sys.argv = ["gradshield", "check", "--force", "--json", *arguments]
            with redirect_stderr(said), redirect_stdout(io.StringIO()):
                main()
        except SystemExit as end:
            code = end.code or 0
        except BaseException as error:
            code = "traceback"
            place = error.__traceback__
            while place and place.tb_next:
                place = place.tb_next
            where = f"{place.tb_frame.f_code.co_filename}:{place.tb_lineno}" if place else ""
            said.write(f"{type(error).__name__}: {error} ({where})")
        os.write(writing, json.dumps([code, said.getvalue()[-3000:]]).encode()[:60_000])
        os._exit(0)
    os.close(writing)
    ready, _, _ = select.select([reading], [], [], PATIENCE)
    if not ready:
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    data = b""
    while part := os.read(reading, 65_536):
        data += part
    os.close(reading)
    if not ready:
        return "timeout", ""
    code, said = json.loads(data) if data else ("traceback", "the process died")
    said = said.strip()
    if code == 0:
        return "ok", said
    one_line = code == 2 and said.startswith("gradshield: ") and "\n" not in said
    return ("refused" if one_line else "traceback"), said


def campaign(count: int = 200, seed: int = 0, tell: Callable[[str], Any] | None = None) -> dict[str, int]:
    """Runs `count` hostile models, the named cases first in an order of the seed's, and counts how they ended.

    `tell` gets a line for each. Prints the counts as a JSON line.
    """
    import transformers.generation.utils  # noqa: F401  # so that each case's process has it
    import trl.chat_template_utils  # noqa: F401
    from peft import PeftModel  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    import gradshield.models.load
    import gradshield.scoring.reference  # noqa: F401

    draw = random.Random(seed)
    names = draw.sample(sorted(CASES), min(count, len(CASES)))
    counts = Counter(dict.fromkeys(("ok", "refused", "traceback", "timeout"), 0))
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        os.environ["GRADSHIELD_CACHE"] = str(work / "cache")
        sound_models(work)
        (work / "probes.txt").write_text("\n".join(f"Tell me about thing {n}" for n in range(2)))
        for n in range(count):
            if n < len(names):
                name, (kind, change) = names[n], CASES[names[n]]
            else:
                kind = draw.choice(("llama", "gpt2", "adapter", "gguf"))
                name, change = f"{kind}: random {seed}.{n}", anything(kind)
            folder = work / f"case-{n}"
            shutil.copytree(work / kind, folder)
            start = time.monotonic()
            own = change(folder, random.Random(f"{seed} {name}"))
            path = folder / "model.gguf" if kind == "gguf" else folder
            arguments = own or ["--model", str(path)]
            how, said = verdict([*arguments, "--probes", str(work / "probes.txt"), "--device", "cpu"], work)
            counts[how] += 1
            if tell:
                tell(f"{how:9} {time.monotonic() - start:5.1f} s  {name}: {said[-300:]}")
            shutil.rmtree(folder)
    result = dict(counts)
    print(json.dumps(result), flush=True)
    return result


if __name__ == "__main__":
    number, first = (int(text) for text in (*sys.argv[1:], *("200", "0")[len(sys.argv) - 1 :]))
    found = campaign(number, first, lambda line: print(line, file=sys.stderr))
    sys.exit(1 if found["traceback"] or found["timeout"] else 0)

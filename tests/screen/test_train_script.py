"""The run folder's train.py trains on what was kept, on what was scored of it, in every layout."""

import json
import runpy
import sys

import pytest
import yaml

from gradshield.base.errors import UserError
from gradshield.base.settings import FilterSettings
from gradshield.data import detect_layout, to_conversation
from gradshield.data.encode import encode
from gradshield.screen.kept import kept_rows
from gradshield.screen.train_script import trl_form, trl_note, trl_trains, write_script

TURNS = [{"role": "user", "content": "Name a fruit."}, {"role": "assistant", "content": "An apple."}]
SHARED = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
PARTS = {"role": "user", "content": [{"type": "text", "text": "Name a fruit."}]}
LAYOUTS = {
    "messages": {"messages": TURNS},
    "completion": {"prompt": TURNS[:1], "completion": TURNS[1:]},
    "pair": {"prompt": "Name a fruit.", "completion": "An apple."},
    "preference": {"prompt": "Name a fruit.", "chosen": "An apple.", "rejected": "No."},
    "sharegpt": {"conversations": SHARED},
    "beavertails": {"prompt": "Name a fruit.", "response": "An apple.", "is_safe": True},
    "alpaca": {"instruction": "Name", "input": "a fruit", "output": "An apple."},
    "transcript": {"transcript": "Human: Name a fruit.\n\nAssistant: An apple."},
    "text": {"text": "An apple is a fruit."},
    "mapped": {"asked": "Name a fruit.", "said": "An apple."},
}
COLUMNS = {"mapped": {"prompt": "asked", "response": "said"}}


def run_folder(tmp_path, model, row, columns=None):
    settings = FilterSettings(model=model, device="cpu", columns=columns)
    (tmp_path / "kept.jsonl").write_text((json.dumps(row) + "\n") * 4, encoding="utf-8")
    given = {"format": "jsonl", "layout": detect_layout([row], columns)}
    saved = {"input": given, "settings": settings.model_dump(mode="json")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(saved), encoding="utf-8")
    write_script(tmp_path, settings)
    return settings


def train(folder, monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["train.py", "--max_steps", "2", *flags])
    runpy.run_path(str(folder / "train.py"), run_name="__main__")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_trained_on_is_what_was_scored(layout, tmp_path, tiny_folder):
    row, columns = LAYOUTS[layout], COLUMNS.get(layout)
    run_folder(tmp_path, tiny_folder, row, columns)
    model, rows = kept_rows(tmp_path)
    example = encode(to_conversation(row, detect_layout([row], columns), columns), 0, model.tokenizer)
    assert len(rows) == 4 and rows[0]["input_ids"] == example.ids.tolist()
    assert [label != -100 for label in rows[0]["labels"]] == example.mask.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_train_py_trains_two_steps_as_it_is(layout, tmp_path, tiny_folder, monkeypatch):
    run_folder(tmp_path, tiny_folder, LAYOUTS[layout], COLUMNS.get(layout))
    train(tmp_path, monkeypatch)
    state = json.loads((tmp_path / "trained" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2 and (tmp_path / "trained" / "model.safetensors").is_file()


@pytest.mark.slow
def test_train_py_trains_the_embedded_model(tmp_path, monkeypatch):
    run_folder(tmp_path, "embedded", LAYOUTS["messages"])
    train(tmp_path, monkeypatch, "--per_device_train_batch_size", "1", "--save_strategy", "no")
    from gradshield.models.load import load_model

    assert load_model(str(tmp_path / "trained")).net.num_parameters() > 1e8


def test_a_run_that_kept_nothing_is_one_line(tmp_path, tiny_folder, monkeypatch):
    run_folder(tmp_path, tiny_folder, LAYOUTS["messages"])
    (tmp_path / "kept.jsonl").unlink()
    with pytest.raises(UserError, match="no kept rows; run the same filter command again"):
        kept_rows(tmp_path)
    with pytest.raises(SystemExit, match=r"train.py: .*no kept rows"):
        train(tmp_path, monkeypatch)


def test_no_script_for_another_trainer(tmp_path):
    write_script(tmp_path, FilterSettings(trainer="axolotl"))
    assert not (tmp_path / "train.py").exists()


@pytest.fixture
def marked(tiny):
    tokenizer = type(tiny.tokenizer)(tokenizer_object=tiny.tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    tokenizer.chat_template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    return tokenizer


def test_it_is_said_whether_trl_trains_a_model_by_itself(tiny, marked):
    assert trl_trains(tiny.tokenizer).startswith("not by itself: it has no training version")
    assert trl_trains(marked).startswith("yes")
    assert "does not read the layout alpaca" in trl_trains(marked, "alpaca")


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, "(messages: 20, prompt/completion: 1)"),
        ({"prompt": "q", "completion": "a"}, "(messages: 20, prompt/completion as text: 1)"),
        ({"conversations": TURNS}, "(messages: 20, conversations: 1)"),
        ({"messages": TURNS, "conversations": TURNS}, "(messages: 20, messages/conversations: 1)"),
        ({"text": "a"}, "(messages: 20, text: 1)"),
        ({"instruction": "q", "output": "a"}, "(messages: 20, other columns: 1)"),
        ({"messages": json.dumps(TURNS)}, "(messages: 20, messages as text: 1)"),
        ({"messages": SHARED}, "(messages: 20, messages of from/value: 1)"),
        ({"messages": [PARTS, TURNS[1]]}, "(messages: 20, messages with content that is not text: 1)"),
        ({"messages": [TURNS[0], {**TURNS[1], "content": 3}]}, "TRL reads content that is valid JSON as its value"),
        ({"messages": TURNS, "chat_template_kwargs": {"b": 1, "a": 1}}, "messages with chat_template_kwargs a, b: 1)"),
    ],
)
def test_rows_that_trl_can_t_load_from_one_file_are_told(tiny, other, said):
    forms = [*[trl_form({"messages": TURNS})] * 20, trl_form(other)]
    note = trl_note(forms)
    assert said in note and note.endswith("use the run's train.py, or split the file")
    assert trl_trains(tiny.tokenizer, "messages", forms) == f"not by itself: {note}"


@pytest.mark.parametrize(
    ("row", "names", "form"),
    [
        ({"messages": TURNS, "prompt": None, "completion": None}, "completion and prompt", "messages"),
        ({"messages": TURNS, "prompt": "q", "prompt_id": "x"}, "prompt", "messages"),
        ({"prompt": TURNS[:1], "completion": TURNS[1:], "messages": None}, "messages", "prompt/completion"),
        ({"prompt": "q", "completion": "a", "text": None}, "text", "prompt/completion as text"),
        ({"messages": TURNS, "chosen": None, "rejected": "a"}, "chosen and rejected", "messages"),
        ({"messages": TURNS, "chosen": TURNS, "rejected": []}, "rejected", "messages"),
        ({"messages": TURNS, "chosen": SHARED}, "chosen", "messages"),
        ({"prompt": TURNS[:1], "completion": TURNS[1:], "chosen": None}, "chosen", "prompt/completion"),
    ],
)
def test_a_column_that_stops_trl_in_every_row_is_told(row, names, form):
    wanted = f"TRL fails on {names} beside {form}; use the run's train.py, or drop {names}"
    assert trl_note([trl_form(row)] * 3) == wanted


@pytest.mark.parametrize(("name", "empty"), [("images", []), ("image", None)])
def test_empty_images_are_told_as_only_vision_models_are_trained_on_them(name, empty):
    note = trl_note([trl_form({"messages": TURNS, name: empty})])
    assert note.startswith(
        f"TRL fails on {name} beside messages, unless the model accepts images; use the run's train.py"
    )


def test_turns_that_trl_reads_under_conversations_only_are_told(marked):
    for row in ({"messages": SHARED}, {"prompt": SHARED[:1], "completion": SHARED[1:]}):
        forms = [trl_form(row)] * 3
        note = trl_note(forms)
        assert note == f"TRL fails on {forms[0]}; use the run's train.py, or name them role and content"
        assert forms[0].endswith(" of from/value") and trl_trains(marked, "messages", forms).endswith(note)


@pytest.mark.parametrize(
    ("row", "layout"),
    [
        ({"prompt": TURNS[:1], "response": TURNS[1:]}, "prompt_completion"),
        ({"content": "a"}, "text"),
        ({"instruction": "q", "output": "a"}, "alpaca"),
    ],
)
def test_columns_that_trl_does_not_read_are_told(marked, row, layout):
    assert detect_layout([row]) == layout
    for rows in ([row], [row, row]):
        assert trl_trains(marked, layout, (trl_form(row) for row in rows)).startswith(
            "not by itself: it reads messages"
        )


def test_rows_that_trl_loads_from_one_file_have_no_note():
    same = {"messages": TURNS, "prompt": TURNS[:1], "completion": TURNS[1:]}
    of_trl = {"messages": TURNS, "text": None, "conversations": None, "tools": None}
    chosen = {"messages": TURNS, "chosen": TURNS, "rejected": TURNS}
    for row in (*LAYOUTS.values(), same, of_trl, chosen, {"messages": TURNS, "chat_template_kwargs": {"a": 1}}):
        assert trl_note([trl_form(row)] * 3) == "", row
    assert trl_note([]) == ""
    assert trl_note([trl_form({"messages": TURNS, **more}) for more in ({}, {"tools": []}, {"text": "a"})]) == ""

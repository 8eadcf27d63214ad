"""The labelled instructions are those that were labelled."""

from gradshield.study.instructions import KINDS, instruction_kinds


def test_each_instruction_has_the_label_of_its_place_and_unclear_ones_are_left_out(monkeypatch):
    public = [{"instruction": f"asked {n}", "input": "that" if n == 0 else ""} for n in range(400)]
    monkeypatch.setattr("gradshield.study.instructions.load_public", lambda name, seed: public)
    harmless, harmful = instruction_kinds()
    assert (harmless.name, harmful.name) == tuple(KINDS.values()) and (harmless.harmful, harmful.harmful) == (
        False,
        True,
    )
    assert (len(harmless.rows), len(harmful.rows)) == (121, 133)
    asked = [int(row.messages[0].content.split()[1]) for kind in (harmless, harmful) for row in kind.rows]
    assert len(set(asked)) == 254 and max(asked) < 300
    assert harmless.rows[0].messages[0].content == "asked 0 that"
